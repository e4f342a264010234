"""One Parquet shard rewritten to small row groups, read back and compared before it gets its name."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.footer import PAGE_BUFFER, CorruptShard, as_corruption, image_values, open_shard
from dinov2.data.storage.base import Storage, StoredFile
from dinov2.utils.files import commit, unfinished

SOURCE_KEY = b"repack_source"  # footer key-value: which file the shard was made from, and how
_ROWS_PER_BATCH = 64  # rows held at a time; more would only take more memory


@dataclass(frozen=True)
class RepackJob:
    """One file to rewrite."""

    storage: Storage
    file: StoredFile
    image: str  # name of the image column
    rows: int
    groups: int
    footer_digest: str
    destination: Path
    row_group_rows: int = 64
    compression: str = "none"  # of the image column

    @property
    def identity(self) -> bytes:
        """Value that the shard keeps under `SOURCE_KEY`."""
        layout = {"row_group_rows": self.row_group_rows, "compression": self.compression}
        return json.dumps({"size": self.file.size, "footer": self.footer_digest} | layout, sort_keys=True).encode()


def repack_shard(job: RepackJob) -> str:
    """Write one shard; return why the source cannot be read, or ""; OSError if the shard reads back differently."""
    job.destination.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(job.destination) as partial:
        try:
            written = _rewrite(job, partial)
        except CorruptShard as error:
            return str(error)
        digest = hashlib.sha256()
        with pq.ParquetFile(partial, pre_buffer=False, buffer_size=PAGE_BUFFER) as file:
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=[job.image], use_threads=False):
                _hash_images(digest, image_values(batch, job.image))
        if digest.hexdigest() != written:
            raise OSError(f"'{partial}' does not read back as it was written; check the disk and the memory")
        commit(partial, job.destination)
    return ""


def _rewrite(job: RepackJob, partial: Path) -> str:
    """Write the partial file and return the digest of the images that were read."""
    digest, rows = hashlib.sha256(), 0
    with as_corruption():
        file = open_shard(job.storage, job.file)
        schema = file.schema_arrow
    metadata = {**(schema.metadata or {}), SOURCE_KEY: job.identity}
    if b"row_group_size" in metadata:
        metadata[b"row_group_size"] = str(job.row_group_rows).encode()
    options = _column_options(file.metadata, job.image, job.compression)
    options |= {"write_page_index": True, "write_batch_size": _ROWS_PER_BATCH}
    with file, pq.ParquetWriter(partial, schema.with_metadata(metadata), **options) as writer:
        for table in _groups(file, job.row_group_rows):
            _hash_images(digest, image_values(table, job.image))
            rows += len(table)
            writer.write_table(table)
    if rows != job.rows:
        raise CorruptShard(f"{rows} rows could be read, but the footer promises {job.rows}")
    return digest.hexdigest()


def _groups(file: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """Read the file in tables of one row group each."""
    batches = file.iter_batches(min(size, _ROWS_PER_BATCH), use_threads=False)
    waiting: list[pa.RecordBatch] = []
    while True:
        with as_corruption():
            batch = next(batches, None)
        if batch is None:
            break
        waiting.append(batch)
        while sum(map(len, waiting)) >= size:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, size)
            waiting = table.slice(size).to_batches()
    if any(map(len, waiting)):
        yield pa.Table.from_batches(waiting)


def _column_options(metadata: pq.FileMetaData, image: str, compression: str) -> dict[str, object]:
    """Writer options: the image column plain, the others encoded and compressed as they are in the source."""
    leaves = range(metadata.num_columns)
    chunks = [metadata.row_group(0).column(leaf) for leaf in leaves] if metadata.num_row_groups else []
    codecs = {chunk.path_in_schema: chunk.compression.replace("UNCOMPRESSED", "NONE") for chunk in chunks}
    others = [path for path in (metadata.schema.column(leaf).path for leaf in leaves) if path != image]
    encoded = [chunk.path_in_schema for chunk in chunks if chunk.has_dictionary_page and chunk.path_in_schema != image]
    compression = codecs | {image: compression}
    return {"use_dictionary": encoded, "write_statistics": others, "compression": compression}


def _hash_images(digest: "hashlib._Hash", images: pa.Array | pa.ChunkedArray) -> None:
    """Add the length and the bytes of every value, nulls told apart from empty ones."""
    if pa.types.is_dictionary(images.type):
        images = images.cast(images.type.value_type)
    for image in images:
        data = image.as_buffer()
        digest.update((-1 if data is None else data.size).to_bytes(8, "little", signed=True))
        digest.update(data or b"")
