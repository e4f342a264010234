"""The contract of an augmentation step: what it draws for a view, and how it changes the image."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np


class View(NamedTuple):
    """One of the views of a sample, before anything is drawn for it."""

    kind: str  # "global1", "global2" or "local"
    number: int  # 0 and 1 for the global views, then the local ones
    size: int  # side of the rendered view in pixels


class AugmentationStep(ABC):
    """A random change of a view.

    What is random is drawn apart from its application, from a stream of its own that depends on the seed, the sample,
    the view and the name of the step alone: a step that is added, removed or set otherwise leaves the draws of all
    others as they were. Steps are pickled on their way to the workers.

    Args:
        options: of a built-in step the section ``augmentation`` of the configuration, else an instance of `Options`.

    Attributes:
        Options: dataclass of the keys of ``augmentation.steps.<name>``, its fields made by
            `dinov2.configs.fields.key`. The built-in steps have none.
        before: the built-in step in front of which this one is applied; None for behind the last.
        takes_grey: whether `apply` accepts images without colours as (H, W); they are turned into (H, W, 3) for steps
            that do not.
        is_geometric: whether it moves pixels and leaves their colours and sharpness as they are; the gram teacher's
            views go through no other step.
        per_tile: whether all views of a tile draw from the stream of its first view, and so draw the same.
    """

    Options: ClassVar[type]
    before: ClassVar[str | None] = None
    takes_grey: ClassVar[bool] = False
    is_geometric: ClassVar[bool] = False
    per_tile: bool = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def draw(self, rng: np.random.Generator, view: View) -> Any | None:
        """Draw the parameters of one view; None leaves the step out.

        Strengths stay as they are when its probability changes, if whether it is applied is drawn before them.
        """

    @abstractmethod
    def apply(self, image: np.ndarray, params: Any) -> np.ndarray:
        """Change an image, in place or not, by what `draw` returned.

        It is uint8 (H, W, 3) RGB, or (H, W) where `takes_grey`; so is the result, of the same height and width.
        """
