"""What travels from a source through the reader, the workers and the collate function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from dinov2.configs import Config
    from dinov2.data.augment.multi_crop import MultiCrops
    from dinov2.data.augment.view_packing import ImageAndViews


class DecodeError(ValueError):
    """The stored bytes of one row are not an image we can read."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One row as stored, on its way from the rank's reader to a decode worker.

    Attributes:
        index: Global sample index g; it alone fixes the row and the augmentation.
        unit: Unit (row group) number in the source.
        row: Row within the unit.
        slide: Slide the tile was cut from.
        data: The stored bytes.
    """

    index: int
    unit: int
    row: int
    slide: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded and augmented row, ready for the collate function.

    Attributes:
        index: Global sample index g.
        crops: The augmented views, or what the device renders them from.
        slide: Slide the tile was cut from.
        replaced: Whether the row at g was damaged and another of its row group stands in for it.
        damage: If replaced, where the damaged row is and what is wrong with it.
        unit: Unit that the row was taken from.
        row: Row within that unit.
    """

    index: int
    crops: MultiCrops | ImageAndViews
    slide: str
    replaced: bool
    damage: str = ""
    unit: int = 0
    row: int = 0


class Source(Protocol):
    """A dataset cut into units, each fetched in one go; methods may be called from any thread or process.

    Attributes:
        unit_rows: Rows of each unit, int64 (U,); zeros are allowed, but not only zeros.
        unit_bytes: Bytes that the samples of each unit take in memory, int64 (U,); an upper estimate.
        fingerprint: Identifies names, sizes and layout: equal fingerprints mean equal samples in equal order.
        num_rows: Sum of `unit_rows`.
        is_remote: Whether a read waits for a network.

    A source may also have ``place``, the path or URL that it was found at, with the commit where there is one;
    ``summary``, what it holds in a few words for the log; and ``is_endless``, true where it is drawn without end
    and therefore cannot be mixed with others; and ``order(seed, lanes, block_rows)``, an order of its own.
    """

    unit_rows: np.ndarray
    unit_bytes: np.ndarray
    fingerprint: str
    num_rows: int
    is_remote: bool

    def read(self, unit: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Fetch the slide name and stored bytes of some rows of a unit, in the order asked for."""

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Turn a sample's bytes into uint8 (H, W, 3) RGB; raises DecodeError where they are no image."""

    def describe(self, unit: int, row: int | None = None) -> str:
        """Name a unit, or one of its rows as it is stored, for a message to the user."""

    def slides(self, unit: int) -> list[str]:
        """Name the slide of every row of a unit, without reading images where that can be."""


@dataclass(frozen=True)
class SourceRequest:
    """What a kind of data is asked to open.

    Attributes:
        path: as configured.
        revision: branch, tag or commit of it; in a resumed run the commit of its first launch.
        config: of the run.
        options: the kind's section in ``data.options``, or its defaults; None where it has no ``Options``.
        cache: file that this dataset has to itself in the run's folder, for an index; None keeps none.
        keep: whether a slide is trained on. A kind asks it of every slide, or, as most do, of none: the rows of
            patients that are excluded or kept for validation are then left out of what it opened.
    """

    path: str
    revision: str
    config: Config
    options: Any
    cache: Path | None
    keep: Callable[[str], bool]


class SourceKind(Protocol):
    """A kind of data, registered in `dinov2.extensions.SOURCES` by the name that ``data.kind`` has for it.

    Its class may hold a dataclass ``Options``, the keys of its section ``data.options.NAME``. The module is
    imported whenever a path is to be recognised; what takes long to import belongs into `open`.

    Attributes:
        accepts: the paths that it can open, in words: ``tiles in tar files (a folder, glob or URL of them)``.
    """

    accepts: str

    def recognises(self, path: str) -> bool:
        """Whether a path is of this kind, by names and first bytes alone; nothing is asked of a network."""

    def open(self, request: SourceRequest) -> Source:
        """Open a dataset; FileNotFoundError, ValueError or OSError say in one sentence why it cannot be."""
