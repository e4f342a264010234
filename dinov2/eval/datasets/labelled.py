"""Tiles with what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dinov2.eval.datasets.images import TileImages

SPLITS = ("train", "val", "test")
GROUPINGS = ("patient", "slide", "tile")


@dataclass(frozen=True)
class LabelledTiles:
    """N tiles; a ValueError tells where the parts do not fit together."""

    images: TileImages
    labels: np.ndarray  # class number of each tile, int64 (N,)
    classes: tuple[str, ...]  # name of each class
    slides: tuple[str, ...] | None = None  # of each tile
    patients: tuple[str, ...] | None = None  # of each tile
    splits: tuple[str, ...] | None = None  # train, val or test for each tile; None where folds are to be made
    per_slide: bool = False  # a label belongs to the slide, and slides are what is counted

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"Labels name {len(self.classes)} class ({', '.join(self.classes)}); at least 2 are needed."
            )
        if absent := [name for number, name in enumerate(self.classes) if not np.any(self.labels == number)]:
            raise ValueError(f"Class {absent[0]!r} has no tiles; every class needs some.")
        if self.splits is None:
            return
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise ValueError(f"Split {unknown[0]!r} is none of {', '.join(SPLITS)}.")
        if missing := [name for name in ("train", "test") if name not in self.splits]:
            raise ValueError(f"Splits hold no {missing[0]} tiles; train and test are needed, val is optional.")

    def groups(self, by: str | None = None) -> np.ndarray:
        """Number of the patient, slide or tile that each tile belongs to, int64 (N,).

        Args:
            by: one of `GROUPINGS`; None takes the widest that is known.

        Raises:
            ValueError: if `by` is not known for these tiles.
        """
        known = {"patient": self.patients, "slide": self.slides, "tile": range(len(self.labels))}
        by = by or next(name for name in GROUPINGS if known[name] is not None)
        if known[by] is None:
            raise ValueError(f"Nothing tells the {by} of a tile: labels need a column {by!r}.")
        return np.unique(np.asarray(known[by]), return_inverse=True)[1]

    def thinned(self, limit: int, seed: int = 0) -> LabelledTiles:
        """At most `limit` tiles of each split, drawn so that classes keep their fractions; order stays."""
        rng = np.random.default_rng(seed)
        splits = np.asarray(self.splits or ["all"] * len(self.labels))
        keep = []
        for split in np.unique(splits):
            members = np.flatnonzero(splits == split)
            if len(members) > limit:
                order = members[np.lexsort((rng.random(len(members)), self.labels[members]))]
                members = order[np.arange(limit) * len(members) // limit]
            keep.append(members)
        chosen = np.sort(np.concatenate(keep))

        def pick(values: Sequence[str] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[i] for i in chosen)

        return replace(
            self, images=SomeTiles(self.images, chosen), labels=self.labels[chosen],
            slides=pick(self.slides), patients=pick(self.patients), splits=pick(self.splits),
        )  # fmt: skip


@dataclass(frozen=True)
class SomeTiles:
    """Those tiles of others that have the given numbers."""

    images: TileImages
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """As the others name it."""
        return self.images.name(int(self.numbers[index]))

    def read(self, index: int) -> np.ndarray:
        """As the others read it."""
        return self.images.read(int(self.numbers[index]))
