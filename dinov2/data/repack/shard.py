"""One Parquet shard rewritten to small row groups, read back and compared before it gets its name."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet.footer import PAGE_BUFFER, Footer, in_one_line, open_shard
from dinov2.data.storage.base import Storage, StoredFile
from dinov2.data.storage.retry import RemoteError
from dinov2.utils.files import commit, unfinished

SOURCE_KEY = b"repack_source"  # footer key-value: which file the shard was made from, and how
_ROWS_PER_BATCH = 64  # rows held at a time; more would only take more memory


@dataclass(frozen=True)
class Layout:
    """Rows of a row group, and codec of the image column ("none", "zstd" ...)."""

    row_group_rows: int = 64
    compression: str = "none"


@dataclass(frozen=True)
class RepackJob:
    """One file to rewrite: `file` of `storage`, with images in a column, rows, and a footer of `footer_digest`."""

    storage: Storage
    file: StoredFile
    image: str
    rows: int
    groups: int
    footer_digest: str
    layout: Layout
    destination: Path

    @property
    def identity(self) -> str:
        """What the shard keeps under `SOURCE_KEY`."""
        source = {"size": self.file.size, "footer": self.footer_digest}
        return json.dumps(source | asdict(self.layout), sort_keys=True)

    def is_done(self, footer: Footer) -> bool:
        """Whether a footer is that of this job's result."""
        kept = (footer.metadata.metadata or {}).get(SOURCE_KEY, b"")
        return kept == self.identity.encode() and footer.metadata.num_rows == self.rows


class _SourceError(Exception):
    """The file to read from is corrupt or cannot be had."""


def repack_shard(job: RepackJob) -> str:
    """Write one shard.

    Returns:
        Why the source cannot be read; an empty string when all is well.

    Raises:
        OSError: if the shard cannot be written, or reads back differently.
    """
    job.destination.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(job.destination) as partial:
        try:
            written = _rewrite(job, partial)
        except _SourceError as error:
            return str(error)
        if _digest_of(partial, job.image) != written:
            raise OSError(f"'{partial}' does not read back as it was written; check the disk and the memory")
        commit(partial, job.destination)
    return ""


@contextmanager
def _source_error() -> Iterator[None]:
    try:
        yield
    except RemoteError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _SourceError(in_one_line(error)) from error


def _rewrite(job: RepackJob, partial: Path) -> str:
    """Write the partial file and return the digest of the images that were read."""
    digest, rows = hashlib.sha256(), 0
    with _source_error():
        file = open_shard(job.storage, job.file)
        schema = file.schema_arrow
    metadata = {**(schema.metadata or {}), SOURCE_KEY: job.identity.encode()}
    if b"row_group_size" in metadata:
        metadata[b"row_group_size"] = str(job.layout.row_group_rows).encode()
    options = _column_options(file.metadata, job.image, job.layout.compression)
    options |= {"write_page_index": True, "write_batch_size": _ROWS_PER_BATCH}
    with file, pq.ParquetWriter(partial, schema.with_metadata(metadata), **options) as writer:
        for table in _groups(file, job.layout.row_group_rows):
            _hash_images(digest, table[job.image])
            rows += len(table)
            writer.write_table(table)
    if rows != job.rows:
        raise _SourceError(f"{rows} rows could be read, but the footer promises {job.rows}")
    return digest.hexdigest()


def _groups(file: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """Read the file in tables of one row group each."""
    batches = file.iter_batches(min(size, _ROWS_PER_BATCH), use_threads=False)
    waiting: list[pa.RecordBatch] = []
    while True:
        with _source_error():
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
    others = [path for path in (metadata.schema.column(leaf).path for leaf in leaves) if path != image]
    chunks = [metadata.row_group(0).column(leaf) for leaf in leaves] if metadata.num_row_groups else []
    codecs = {chunk.path_in_schema: chunk.compression.replace("UNCOMPRESSED", "NONE") for chunk in chunks}
    encoded = {chunk.path_in_schema for chunk in chunks if chunk.has_dictionary_page}
    return {
        "use_dictionary": [path for path in others if path in encoded],
        "write_statistics": others,
        "compression": codecs | {image: compression},
    }


def _digest_of(partial: Path, image: str) -> str:
    """Digest of the images in the partial file, which must hold all rows."""
    digest = hashlib.sha256()
    with pq.ParquetFile(partial, pre_buffer=False, buffer_size=PAGE_BUFFER) as written:
        for batch in written.iter_batches(_ROWS_PER_BATCH, columns=[image], use_threads=False):
            _hash_images(digest, batch[image])
    return digest.hexdigest()


def _hash_images(digest: "hashlib._Hash", images: pa.Array | pa.ChunkedArray) -> None:
    """Add the length and the bytes of every value, nulls told apart from empty ones."""
    if pa.types.is_dictionary(images.type):
        images = images.cast(images.type.value_type)
    for image in images:
        data = image.as_buffer()
        digest.update((-1 if data is None else data.size).to_bytes(8, "little", signed=True))
        digest.update(data or b"")
