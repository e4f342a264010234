"""Tile indexes on disk: what is small as JSON, offsets and lengths of tiles as arrays beside it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.online.tissue_mask import save_arrays
from dinov2.data.slides.blocks import TileIndex, TileLevel

_NO_ARRAYS = {"offsets": np.zeros((1, 1), np.int64), "lengths": np.zeros((1, 1), np.int32)}


def store_arrays(path: Path, index: TileIndex) -> None:
    """Write the offsets and lengths of an index."""
    arrays = [(level.offsets, level.lengths) for level in index.levels]
    offsets = {f"offsets{number}": offset for number, (offset, _) in enumerate(arrays)}
    save_arrays(path, **offsets, **{f"lengths{number}": length for number, (_, length) in enumerate(arrays)})


def load_arrays(path: Path, outline: TileIndex) -> TileIndex:
    """Complete an outline by the arrays stored for it."""
    with np.load(path) as stored:
        levels = [
            replace(level, offsets=stored[f"offsets{number}"], lengths=stored[f"lengths{number}"])
            for number, level in enumerate(outline.levels)
        ]
    return replace(outline, levels=tuple(levels))


def describe(index: TileIndex) -> list[dict[str, Any]]:
    """Its levels without offsets and lengths, for JSON, and the longest tile of each."""
    described = []
    for level in index.levels:
        facts = asdict(replace(level, **_NO_ARRAYS))
        facts = {name: value for name, value in facts.items() if name not in _NO_ARRAYS}
        tables = base64.b64encode(level.jpeg_tables).decode()
        described.append({**facts, "jpeg_tables": tables, "longest": int(level.lengths.max())})
    return described


def outline(
    path: str, size: int, described: Sequence[Mapping[str, Any]], downsamples: Sequence[float]
) -> TileIndex:
    """An index with all that `assemble` needs, but without offsets and lengths, so that it takes little memory."""
    levels = []
    for facts in described:
        fields = {name: value for name, value in facts.items() if name != "longest"}
        fields["jpeg_tables"] = base64.b64decode(fields["jpeg_tables"])
        levels.append(TileLevel(**fields, **_NO_ARRAYS))
    return TileIndex(path, size, tuple(levels), tuple(downsamples), None, "none")
