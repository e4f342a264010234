"""Small Parquet datasets of both schemas, whose tiles carry their own number in their pixels."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TILE = 8  # side in pixels


def tile(number: int) -> np.ndarray:
    """Make the uint8 (TILE, TILE, 3) tile that `tile_number` reads back."""
    pixels = np.random.default_rng(number).integers(0, 256, (TILE, TILE, 3), np.uint8)
    pixels[0, 0] = number >> 16, number >> 8 & 255, number & 255
    return pixels


def tile_number(image: np.ndarray) -> int:
    """Read the number from a tile that went through a lossless encoding."""
    red, green, blue = image[0, 0].tolist()
    return red << 16 | green << 8 | blue


def encode(image: np.ndarray, encoding: str) -> bytes:
    """Encode with Pillow as PNG or JPEG, or return raw pixels."""
    if encoding == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, encoding.upper())
    return buffer.getvalue()


def write_published(
    path: Path, images: Sequence[bytes | None], group: int | Iterable[int] = 4, encoding: str = "png"
) -> Path:
    """Write one shard of the published nine-column schema; `group`: rows per row group, or of each one."""
    schema = pa.schema(
        [
            ("task_id", pa.string()),
            ("slide_path", pa.string()),
            *((name, pa.int32()) for name in ("x", "y", "level")),
            ("level_downsample", pa.float32()),
            ("tile_size", pa.int32()),
            ("image_dtype", pa.string()),
            ("image_bytes", pa.binary()),
        ],
        metadata={"image_encoding": encoding, "tile_size": str(TILE)},
    )
    row = {"task_id": "00000000", "slide_path": f"/slides/{path.stem}.svs", "x": 0, "y": 0, "level": 0}
    row |= {"level_downsample": 1.0, "tile_size": TILE, "image_dtype": "uint8"}
    table = pa.Table.from_pylist([row | {"image_bytes": data} for data in images], schema=schema)
    return write_groups(path, table, group)


def write_nanopath(path: Path, images: Sequence[bytes | None], group: int | Iterable[int] = 4) -> Path:
    """Write one shard of the two-column schema with slide names in the tile paths."""
    names = [f"{path.stem}/{number}_0_1.jpg" for number in range(len(images))]
    return write_groups(path, pa.table({"path": names, "jpeg": pa.array(images, pa.binary())}), group)


def write_groups(path: Path, table: pa.Table, group: int | Iterable[int]) -> Path:
    """Write a table with row groups of equal or given sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = [group] * -(-len(table) // group) if isinstance(group, int) else list(group)
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return path


def write_dataset(folder: Path, shard_rows: Sequence[int], group: int = 4) -> Path:
    """Write published-schema PNG shards whose tiles are numbered in file order from 0."""
    number = 0
    for shard, rows in enumerate(shard_rows):
        images = [encode(tile(number + row), "png") for row in range(rows)]
        write_published(folder / f"{shard:04d}.parquet", images, group)
        number += rows
    return folder
