"""Lists of images: a table of paths as the files of a dataset."""

import logging
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2.data.images.files import IMAGES
from dinov2.data.images.origins import FIELDS, Origins, as_told
from dinov2.data.images.table import FILE_COLUMNS, file_column, read_table
from dinov2.data.storage.base import FileType, LocalStorage, Storage, StoredFile
from dinov2.data.storage.locate import open_storage

logger = logging.getLogger(__name__)

_TABLE = FileType("CSV", (".csv", ".tsv"))


def open_image_list(
    path: str, retries: int = 8, named: str = "", pattern: str = ""
) -> tuple[Storage, list[StoredFile], Origins]:
    """Read a CSV or TSV file that names images: where they lie, the files sorted by name, and their origins.

    Paths are relative to the table, or to the current directory where only that file exists; over a network they lie
    below the table. Columns `patient`, `slide` and `site` are taken where they are; of a column `split` only the rows
    that say train, if any does. A file that is named twice counts once. FileNotFoundError if files are missing,
    ValueError if there is no column of files.

    Args:
        retries: of each remote read.
        named: name of the column of files, where it is none of `FILE_COLUMNS`.
        pattern: as of `Origins`.
    """
    stored = open_storage(path, retries=retries, files=_TABLE)
    (file,) = stored.list_files()
    table = read_table(stored.read_range(file.name, 0, file.size), stored.locate(file.name))
    column = file_column(list(table), named)
    if not column:
        found = f"'{path}' has the columns {', '.join(table) or 'none'}"
        raise ValueError(f"{found}; one of files ({', '.join(FILE_COLUMNS)}), or data.image_column, is expected")
    table = pa.table({name: values for name, values in table.items() if name in (column, "split", *FIELDS)})
    table = table.filter(pc.not_equal(table[column], ""))
    if "split" in table.column_names and pc.any(training := pc.equal(pc.utf8_lower(table["split"]), "train")).as_py():
        logger.warning("'%s': %d of %d rows are of its split train", path, pc.sum(training).as_py(), len(table))
        table = table.filter(training)
    names = [name.removeprefix("./") for name in table[column].to_pylist()]
    if not names:
        raise ValueError(f"'{path}' names no image; at least one is expected")
    order = sorted({name: row for row, name in reversed(list(enumerate(names)))}.items())
    location = os.path.dirname(path.removeprefix("file://"))
    if isinstance(stored, LocalStorage):
        beside = os.path.exists(os.path.join(location, names[0])) or not os.path.exists(names[0])
        storage: Storage = LocalStorage(os.path.expanduser(location if beside else "") or ".")
        files = list(_local_files(path, storage, [name for name, _ in order]))
    else:
        storage = open_storage(location, retries=retries, files=IMAGES)
        files = _remote_files(path, storage, [name for name, _ in order])
    rows = np.array([row for _, row in order], np.int32)
    told = {name: table[name].combine_chunks() for name in (column, *FIELDS) if name in table.column_names}
    return storage, files, Origins(pattern, rows, as_told(told))


def _local_files(path: str, storage: Storage, names: list[str]) -> Iterator[StoredFile]:
    missing = []
    for name in names:
        try:
            status = os.stat(storage.locate(name))
            yield StoredFile(name, status.st_size, str(status.st_mtime_ns))
        except FileNotFoundError:
            missing.append(storage.locate(name))
    if missing:
        raise _missing(path, missing, len(names))


def _remote_files(path: str, storage: Storage, names: list[str]) -> list[StoredFile]:
    found = {file.name: file for file in storage.list_files()}
    if missing := [name for name in names if name not in found]:
        raise _missing(path, [storage.locate(name) for name in missing], len(names))
    return [found[name] for name in names]


def _missing(path: str, missing: list[str], total: int) -> FileNotFoundError:
    found = f"{len(missing)} of {total} images of '{path}' do not exist, the first is '{missing[0]}'"
    return FileNotFoundError(f"{found}; paths are relative to the table")
