"""One Parquet shard made of some row groups of a source."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dinov2.data.source import DecodeError, EncodedSample, Source, image_format, origins_of
from dinov2.utils.files import replacing

SOURCE_KEY = b"pack_source"  # of a shard's metadata: what it was made of
_GROUP_ROWS = 64
_SCHEMA = pa.schema(
    [("image_bytes", pa.binary()), *((name, pa.string()) for name in ("slide_path", "patient", "site", "tile"))]
)


@dataclass(frozen=True)
class PackJob:
    """One shard to write."""

    source: Source
    groups: range
    path: Path
    identity: bytes


def pack_shard(job: PackJob) -> dict[str, str]:
    """Write one shard; return why images that it lacks cannot be read, by name."""
    failed: dict[str, str] = {}
    schema = _SCHEMA.with_metadata({SOURCE_KEY: job.identity})
    options = {"compression": {"image_bytes": "none"}, "use_dictionary": ["slide_path", "patient", "site"]}
    options["write_statistics"] = ["slide_path", "patient", "site"]
    with replacing(job.path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for group in job.groups:
            rows = range(int(job.source.group_rows[group]))
            read = zip(rows, origins_of(job.source, group), job.source.read(group, rows), strict=True)
            packed = []
            for row, origin, (slide, data) in read:
                tile, *told = map(_as_utf8, (job.source.describe(group, row), *origin))
                try:
                    packed.append((_as_file(job.source, EncodedSample(0, group, row, slide, data)), *told, tile))
                except DecodeError as error:
                    failed[tile] = str(error)
            if packed:
                columns = zip(zip(*packed, strict=True), _SCHEMA.types, strict=True)
                arrays = [pa.array(list(values), kind) for values, kind in columns]
                writer.write_table(pa.table(arrays, schema=schema), _GROUP_ROWS)
    return failed


def _as_utf8(name: str) -> str:
    """A name of which bytes that are no UTF-8 are replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _as_file(source: Source, sample: EncodedSample) -> bytes:
    """The stored bytes of an image file, or pixels as PNG."""
    if image_format(sample.data):
        return sample.data
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(source.decode(sample))).save(buffer, "PNG")
    return buffer.getvalue()
