"""Tiles read ahead by threads and made to fit the network."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dinov2.eval.datasets.images import TileImages, UnreadableImage
from dinov2.hub.pixels import centred_square

logger = logging.getLogger("dinov2")

_TILES_AT_ONCE = 8  # that one thread reads, neighbours of one slide


@dataclass(frozen=True)
class Part:
    """The tiles of one part.

    Attributes:
        tiles: to be read, from several threads.
        columns: what the output says of each tile, by column, each as long as the part.
        about: what it says of the part, JSON.
        close: give back what was opened.
    """

    tiles: TileImages
    columns: dict[str, Sequence[Any]]
    about: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


class TileInput(ABC):
    """Tiles in a fixed order, cut into parts that are embedded and kept one by one.

    Attributes:
        kind: ``images``, ``parquet`` or ``slides``.
        fingerprint: of what is embedded; equal ones mean equal tiles in equal parts.
        parts: file name of each part's output, without ending.
        part_rows: number of tiles of each part; None where only opening tells.
    """

    kind: ClassVar[str]
    fingerprint: str
    parts: list[str]
    part_rows: list[int] | None = None

    @abstractmethod
    def open(self, number: int) -> Part:
        """Open a part; raises UnreadableImage where it cannot be."""


class Piece(NamedTuple):
    """Some neighbouring tiles of a part; in place of an unreadable one stands why."""

    number: int
    part: Part
    first: int
    tiles: list[np.ndarray | UnreadableImage]


@dataclass
class Fitting:
    """How tiles get sides that the network takes.

    Attributes:
        patch_size: of the network, in px.
        image_size: side in px to which the largest centred square is resized; None keeps the scale and cuts the edges
            off evenly, down to multiples of the patch.
    """

    patch_size: int
    image_size: int | None = None

    def __post_init__(self) -> None:
        self._told = False
        if self.image_size is not None and (self.image_size < 1 or self.image_size % self.patch_size):
            raise ValueError(
                f"--image-size is {self.image_size}, but it must be a positive multiple of the patch size "
                f"{self.patch_size}."
            )

    def read(self, tiles: TileImages, index: int) -> np.ndarray | UnreadableImage:
        """A tile that fits, or why there is none."""
        try:
            return self.fit(tiles.read(index), tiles.name(index))
        except UnreadableImage as error:
            return error

    def fit(self, image: np.ndarray, name: str) -> np.ndarray:
        """A uint8 (H, W, 3) tile with sides that are multiples of the patch; raises UnreadableImage if too small."""
        if self.image_size is not None:
            return centred_square(image, self.image_size)
        height, width = (side - side % self.patch_size for side in image.shape[:2])
        if not (height and width):
            raise UnreadableImage(
                f"{name} has {image.shape[1]} x {image.shape[0]} px, less than a patch of {self.patch_size}; "
                "--image-size enlarges images."
            )
        if (height, width) != image.shape[:2] and not self._told:
            self._told = True
            logger.warning(
                "Images such as %s of %d x %d px are cut to %d x %d; --image-size scales them instead.",
                name, image.shape[1], image.shape[0], width, height,
            )  # fmt: skip
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]


def read_ahead(
    source: TileInput,
    numbers: Sequence[int],
    fitting: Fitting,
    *,
    workers: int,
    tiles_ahead: int,
    unreadable: list[str] | None,
) -> Generator[Piece, None, None]:
    """Tiles of some parts in order, read by threads; while a part is read the next is opened.

    Args:
        source: of the parts.
        numbers: which parts.
        fitting: how tiles are made to fit.
        workers: threads that read.
        tiles_ahead: read before they are asked for.
        unreadable: takes up why parts cannot be opened; None raises that.

    Yields:
        At least one piece of every part that can be opened; parts are closed when the next begins.

    Raises:
        UnreadableImage: see `unreadable`.
    """
    pool, opener = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
    opening: deque[tuple[int, Future[Part]]] = deque()
    remaining, waiting = iter(numbers), deque()

    def open_next() -> None:
        if (number := next(remaining, None)) is not None:
            opening.append((number, opener.submit(source.open, number)))

    def read(tiles: TileImages, first: int) -> list[np.ndarray | UnreadableImage]:
        return [fitting.read(tiles, index) for index in range(first, min(first + _TILES_AT_ONCE, len(tiles)))]

    try:
        open_next()
        while opening:
            number, opened = opening.popleft()
            open_next()
            try:
                part = opened.result()
            except UnreadableImage as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
                continue
            for first in range(0, max(1, len(part.tiles)), _TILES_AT_ONCE):
                waiting.append((number, part, first, pool.submit(read, part.tiles, first)))
                if len(waiting) * _TILES_AT_ONCE > tiles_ahead:
                    yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    finally:
        for executor in (pool, opener):
            executor.shutdown(cancel_futures=True)


def _finished(waiting: deque) -> Piece:
    number, part, first, reading = waiting.popleft()
    tiles = reading.result()
    if first + len(tiles) >= len(part.tiles):
        part.close()
    return Piece(number, part, first, tiles)
