"""Embedding of an input into a folder, part by part, so that a run that was stopped goes on where it was."""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm

from dinov2.eval.datasets.images import TileImages, UnreadableImage
from dinov2.eval.embed.files import ENDINGS, STORED, embedding_file
from dinov2.eval.embed.inputs import Part, TileInput
from dinov2.eval.features import Embedding, embed_tiles, map_ahead
from dinov2.hub.pixels import centred_square
from dinov2.utils.files import check_description, leftovers, locked, write_json

logger = logging.getLogger("dinov2")

DESCRIPTION = "_embedding.json"  # readers of Parquet folders leave files with this underscore out
_ALL_RANKS = 1 << 20
_TILES_AT_ONCE = 8  # that one thread reads, neighbours of one slide

Tile = np.ndarray | UnreadableImage  # pixels, or why there are none


class Chunk(NamedTuple):
    """Some neighbouring tiles of a part, and their numbers in it."""

    number: int  # of the part
    part: Part
    tiles: list[tuple[int, Tile]]


@dataclass(frozen=True)
class Output:
    """Destination of embeddings, and their format."""

    folder: Path  # new, empty, or of the same run
    format: str  # a key of ENDINGS
    stored: str  # dtype of the embeddings, a key of STORED
    width: int  # of an embedding
    identity: dict[str, Any]  # JSON of all that decides over the embeddings; a folder of another one is refused

    def path(self, part: str) -> Path:
        """File of a part."""
        return self.folder / f"{part}{ENDINGS[self.format]}"

    def prepare(self, parts: Sequence[str], about: dict[str, Any]) -> list[int]:
        """Make and check the folder and clear unfinished files away; returns the numbers of the missing parts.

        ``about`` holds further notes for the description. FileExistsError: if the folder is of another run, holds other
        files, or is in use.
        """
        description = self.folder / DESCRIPTION
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise FileExistsError(f"Output '{self.folder}' is a file; give a new or empty folder.") from error
        if not check_description(description, self.identity):
            begun = {partial for _, partial in leftovers(self.folder)}
            if others := sorted(set(self.folder.iterdir()) - begun):
                raise FileExistsError(
                    f"Output '{self.folder}' holds other files, '{others[0].name}' for one; give a new or empty folder."
                )
            write_json(description, {"build": self.identity, "about": about})
        with locked(description, 0, _ALL_RANKS):
            names = {self.path(part).name for part in parts} | {DESCRIPTION}
            for name, partial in leftovers(self.folder):
                if name in names:
                    partial.unlink(missing_ok=True)
        return [number for number, part in enumerate(parts) if not self.path(part).exists()]


@dataclass
class Fitting:
    """Cutting or scaling of tiles to sides that the network takes."""

    patch_size: int  # of the network, in px
    image_size: int | None = None  # of the resized centred square; None cuts edges off evenly, to whole patches
    _has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.image_size is not None and (self.image_size < 1 or self.image_size % self.patch_size):
            raise ValueError(
                f"--image-size is {self.image_size}, but it must be a positive multiple of the patch size "
                f"{self.patch_size}."
            )

    def read(self, tiles: TileImages, index: int) -> Tile:
        """A uint8 (H, W, 3) tile with sides that are multiples of the patch, or why there is none."""
        try:
            image = tiles.read(index)
        except UnreadableImage as error:
            return error
        if self.image_size is not None:
            return centred_square(image, self.image_size)
        found_height, found_width = image.shape[:2]
        height, width = (side - side % self.patch_size for side in image.shape[:2])
        if not (height and width):
            return UnreadableImage(
                f"{tiles.name(index)} has {found_width} x {found_height} px, less than a patch of {self.patch_size}; "
                "--image-size enlarges images."
            )
        if (height, width) != image.shape[:2] and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Images such as %s of %d x %d px are cut to %d x %d; --image-size scales them instead.",
                tiles.name(index), found_width, found_height, width, height,
            )  # fmt: skip
        top, left = (found_height - height) // 2, (found_width - width) // 2
        return image[top : top + height, left : left + width]


def embed_parts(
    source: TileInput,
    numbers: Sequence[int],
    output: Output,
    backbone: nn.Module,
    embedding: Embedding,
    fitting: Fitting,
    workers: int,
    skip_corrupt: bool,
) -> None:
    """Embed some parts of an input, by number, and write a file for each into a prepared folder.

    Tiles are read by threads, in order and ahead, also over the end of a part: the next part is opened meanwhile. With
    ``skip_corrupt`` a tile or slide that cannot be read is left out, with a warning; otherwise that is a ValueError, as
    is an embedding that is not finite in the dtype it is stored as.
    """
    written, left_out, unreadable = 0, 0, []
    options = {"total": len(numbers), "bar_format": "{l_bar}{bar}| {n:.2f}/{total} slides [{elapsed}<{remaining}]"}
    if source.part_rows:
        options = {"total": sum(source.part_rows[number] for number in numbers), "unit": "tile"}
    chunks = _read_ahead(source, numbers, fitting, workers, embedding.batch_size, unreadable if skip_corrupt else None)
    with closing(chunks), tqdm(desc="embedding", disable=None if embedding.show_progress else True, **options) as bar:
        for (number, part), of_part in groupby(chunks, key=lambda chunk: chunk[:2]):
            corrupt: list[str] = []
            step = 1 if source.part_rows else 1 / max(1, len(part.tiles))
            with embedding_file(output.path(source.parts[number]), output.width, output.stored) as file:
                for batch in _batches(of_part, embedding.batch_size, corrupt if skip_corrupt else None):
                    indices, tiles = zip(*batch, strict=True)
                    columns = {name: [values[i] for i in indices] for name, values in part.columns.items()}
                    features = embed_tiles(backbone, tiles, embedding).cpu().numpy()
                    file.append(columns, _as_stored(features, output.stored, part, indices))
                    written += len(batch)
                    bar.update(len(batch) * step)
                file.finish({"run": output.identity, "part": part.about, "damaged": corrupt})
            part.close()
            left_out += len(corrupt)
            bar.update(len(corrupt) * step)
            if not len(part.tiles):
                bar.update()
                logger.warning("Slide '%s': %s.", part.about["path"], part.nothing)
    if left_out:
        logger.warning("%d tiles could not be read and were left out; their files say which.", left_out)
    if unreadable:
        logger.warning("%d parts could not be read: %s", len(unreadable), unreadable[0])
    logger.info("Wrote %d embeddings into %s.", written, output.folder)


def _read_ahead(
    source: TileInput,
    numbers: Sequence[int],
    fitting: Fitting,
    workers: int,
    batch_size: int,
    unreadable: list[str] | None,
) -> Generator[Chunk, None, None]:
    """Tiles of some parts in order, at least one chunk of each; ``unreadable`` takes up why others cannot be opened."""

    def open_part(number: int) -> Part | UnreadableImage:
        try:
            return source.open(number)
        except UnreadableImage as error:
            return error

    def spans() -> Iterator[tuple[int, Part, range]]:
        for number, part in zip(numbers, map_ahead(open_part, numbers, workers=1, ahead=1), strict=True):
            if isinstance(part, Part):
                count = len(part.tiles)
                for first in range(0, max(1, count), _TILES_AT_ONCE):
                    yield number, part, range(first, min(first + _TILES_AT_ONCE, count))
            elif unreadable is None:
                raise part
            else:
                unreadable.append(str(part))

    def read(span: tuple[int, Part, range]) -> Chunk:
        number, part, indices = span
        return Chunk(number, part, [(index, fitting.read(part.tiles, index)) for index in indices])

    ahead = 2 * max(batch_size, _TILES_AT_ONCE * workers) // _TILES_AT_ONCE
    return map_ahead(read, spans(), workers, ahead)


def _batches(chunks: Iterable[Chunk], size: int, corrupt: list[str] | None) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Good tiles of a part and their numbers in it, at most ``size`` at a time."""
    batch = []
    for chunk in chunks:
        for index, tile in chunk.tiles:
            if isinstance(tile, np.ndarray):
                batch.append((index, tile))
            elif corrupt is None:
                raise tile
            else:
                corrupt.append(str(tile))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _as_stored(embeddings: np.ndarray, stored: str, part: Part, indices: Sequence[int]) -> np.ndarray:
    with np.errstate(over="ignore"):
        embeddings = embeddings.astype(STORED[stored])
    finite = np.isfinite(embeddings).all(1)
    if not finite.all():
        name = part.tiles.name(indices[int(np.argmin(finite))])
        raise ValueError(
            f"The embedding of {name} is not finite in {stored}; --dtype fp32 with --store fp32 has the widest range."
        )
    return embeddings
