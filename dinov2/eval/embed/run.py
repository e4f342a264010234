"""Embedding of an input into a folder, part by part, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dinov2.eval.datasets.images import UnreadableImage
from dinov2.eval.embed.files import ENDINGS, STORED, EmbeddingFile, embedding_file
from dinov2.eval.embed.read_ahead import Fitting, Part, Piece, TileInput, read_ahead
from dinov2.utils.files import check_description, leftovers, locked, write_json

logger = logging.getLogger("dinov2")

DESCRIPTION = "_embedding.json"  # readers of Parquet folders leave files with this underscore out
_ALL_RANKS = 1 << 20


@dataclass(frozen=True)
class Output:
    """Where embeddings go, and as what.

    Attributes:
        folder: new, empty, or of the same run.
        format: a key of `ENDINGS`.
        stored: dtype of the embeddings, a key of `STORED`.
        width: of an embedding.
        identity: JSON of all that decides over the embeddings; another one is refused.
    """

    folder: Path
    format: str
    stored: str
    width: int
    identity: dict[str, Any]

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"{part}{ENDINGS[self.format]}"

    def prepare(self, parts: Sequence[str], about: dict[str, Any]) -> list[int]:
        """Make and check the folder and clear unfinished files away; returns the numbers of the missing parts.

        Args:
            parts: of the input.
            about: further notes for the description.

        Raises:
            FileExistsError: if the folder is of another run, holds other files, or is in use.
            OSError: if it cannot be written.
        """
        description = self.folder / DESCRIPTION
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise FileExistsError(f"Output '{self.folder}' is a file; give a new or empty folder.") from error
        if not check_description(description, self.identity):
            begun = {partial for _, partial in leftovers(self.folder)}
            other = next((path for path in sorted(self.folder.iterdir()) if path not in begun), None)
            if other is not None:
                raise FileExistsError(
                    f"Output '{self.folder}' holds other files, '{other.name}' for one; give a new or empty folder."
                )
            write_json(description, {"build": self.identity, "about": about})
        with locked(description, 0, _ALL_RANKS):
            names = {self.path(part).name for part in parts} | {DESCRIPTION}
            for name, partial in leftovers(self.folder):
                if name in names:
                    partial.unlink(missing_ok=True)
        return [number for number, part in enumerate(parts) if not self.path(part).exists()]


@dataclass
class Counts:
    """What a process has done: embeddings written, tiles left out, and why slides or shards were left out."""

    written: int = 0
    damaged: int = 0
    unreadable: list[str] | None = None


def embed_parts(
    source: TileInput,
    numbers: Sequence[int],
    output: Output,
    embedder: Callable[[Sequence[np.ndarray]], np.ndarray],
    fitting: Fitting,
    *,
    batch_size: int,
    workers: int,
    skip_damaged: bool = False,
    show_progress: bool = True,
) -> Counts:
    """Embed some parts of an input and write a file for each.

    Args:
        source: the input.
        numbers: which of its parts.
        output: a prepared folder.
        embedder: tiles to embeddings, float32 (N, D).
        fitting: how tiles are made to fit.
        batch_size: tiles in a forward pass.
        workers: threads that read.
        skip_damaged: leave out what cannot be read instead of raising.
        show_progress: draw a bar, where there is a terminal.

    Raises:
        ValueError: if a tile or slide cannot be read, or an embedding is not finite in the dtype it is stored as.
        OSError: if a shard cannot be read, or a file not written.
    """
    counts = Counts(unreadable=[] if skip_damaged else None)
    pieces = read_ahead(
        source, numbers, fitting, workers=workers, tiles_ahead=2 * max(batch_size, 8 * workers),
        unreadable=counts.unreadable,
    )  # fmt: skip
    with closing(pieces), _bar(source, numbers, show_progress) as bar:
        for number, of_part in groupby(_watched(pieces, source, bar), key=lambda piece: piece.number):
            damaged: list[str] = []
            with embedding_file(output.path(source.parts[number]), output.width, output.stored) as file:
                for part, places, tiles in _batches(of_part, batch_size, damaged if skip_damaged else None):
                    if places:
                        _append(file, part, places, embedder(tiles), output.stored)
                        counts.written += len(places)
                file.finish({"run": output.identity, "part": part.about, "damaged": damaged})
            counts.damaged += len(damaged)
            if not len(part.tiles):
                logger.warning("Slide '%s' has no tile with enough tissue.", part.about["path"])
    return counts


def _bar(source: TileInput, numbers: Sequence[int], shown: bool) -> tqdm:
    options: dict[str, Any] = {"total": len(numbers), "unit": "slide"}
    options["bar_format"] = "{l_bar}{bar}| {n:.2f}/{total} slides [{elapsed}<{remaining}]"
    if source.part_rows is not None:
        options = {"total": sum(source.part_rows[number] for number in numbers), "unit": "tile"}
    return tqdm(desc="embedding", disable=None if shown else True, **options)


def _watched(pieces: Iterable[Piece], source: TileInput, bar: tqdm) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        if source.part_rows is not None:
            bar.update(len(piece.tiles))
        else:
            bar.update(len(piece.tiles) / len(piece.part.tiles) if len(piece.part.tiles) else 1)


def _batches(
    pieces: Iterable[Piece], size: int, damaged: list[str] | None
) -> Iterator[tuple[Part, list[int], list[np.ndarray]]]:
    """Good tiles of a part and their places in it, at most `size` at a time; the last batch may be empty."""
    places: list[int] = []
    tiles: list[np.ndarray] = []
    for piece in pieces:
        for place, tile in enumerate(piece.tiles, piece.first):
            if isinstance(tile, UnreadableImage):
                if damaged is None:
                    raise tile
                damaged.append(str(tile))
                continue
            places.append(place)
            tiles.append(tile)
            if len(places) == size:
                yield piece.part, places, tiles
                places, tiles = [], []
    yield piece.part, places, tiles


def _append(file: EmbeddingFile, part: Part, places: list[int], embeddings: np.ndarray, stored: str) -> None:
    with np.errstate(over="ignore"):
        embeddings = embeddings.astype(STORED[stored])
    finite = np.isfinite(embeddings).all(1)
    if not finite.all():
        name = part.tiles.name(places[int(np.argmin(finite))])
        raise ValueError(
            f"The embedding of {name} is not finite in {stored}; --dtype fp32 with --store fp32 has the widest range."
        )
    columns = {
        name: values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]
        for name, values in part.columns.items()
    }
    file.append(columns, embeddings)
