"""Footers of all files of a dataset, for commands that look at it: what is damaged or wrong is named, not raised."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pyarrow.parquet as pq

from dinov2.data.parquet.footer import DamagedFooter, Footer, for_each_file, in_one_line, read_footer
from dinov2.data.storage.base import LocalStorage, RangedFile, Storage, StoredFile
from dinov2.data.storage.retry import RemoteError

PAGE_BUFFER = 1 << 20  # pyarrow then reads page by page, not whole column chunks
_REMOTE_PAGE_BUFFER = 1 << 24  # the same in fewer requests

Summary = TypeVar("Summary")


class Unusable(NamedTuple):
    """A file that cannot be read, and why."""

    name: str
    reason: str


class WrongSchema(Unusable):
    """A readable file that training refuses, and why."""


def read_footers(
    storage: Storage, files: Sequence[StoredFile], summarise: Callable[[StoredFile, Footer], Summary]
) -> list[Summary | Unusable]:
    """Read all footers by threads, under a progress bar, and keep a summary of each.

    Args:
        storage: Where the files are.
        files: As listed by it.
        summarise: What to keep, so that not all footers stay in memory; ValueError means a wrong schema.

    Raises:
        RemoteError: A server does not answer.
    """
    from tqdm import tqdm

    def one(file: StoredFile) -> Summary | Unusable:
        try:
            return summarise(file, read_footer(storage, file))
        except RemoteError:
            raise
        except (DamagedFooter, OSError) as error:
            return Unusable(file.name, in_one_line(error))
        except ValueError as error:
            return WrongSchema(file.name, in_one_line(error))

    results = for_each_file(files, one)
    return list(tqdm(results, total=len(files), desc="footers", unit="file", disable=None, leave=False))


def open_shard(storage: Storage, file: StoredFile) -> pq.ParquetFile:
    """Open a file so that pages, not row groups, are what is held in memory."""
    if isinstance(storage, LocalStorage):
        return pq.ParquetFile(storage.locate(file.name), pre_buffer=False, buffer_size=PAGE_BUFFER)
    ranged = RangedFile(storage, file.name, file.size)
    return pq.ParquetFile(ranged, pre_buffer=False, buffer_size=_REMOTE_PAGE_BUFFER)
