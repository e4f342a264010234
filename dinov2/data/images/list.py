"""Lists of images: a table of paths as the files of a dataset."""

import logging
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2.data.images.files import IMAGES
from dinov2.data.images.origins import Origins, as_told, check_alike
from dinov2.data.images.table import FIELDS, FILE_COLUMNS, file_column, read_table
from dinov2.data.storage.base import FileType, LocalStorage, Storage, StoredFile
from dinov2.data.storage.fsspec import ObjectStorage
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.retry import OUTAGE_S

logger = logging.getLogger(__name__)

_TABLE = FileType("CSV", (".csv", ".tsv", ".txt"))
_TRAINING = ("train", "training")
_OTHERS = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation", "holdout")


def open_image_list(
    path: str, outage_s: float = OUTAGE_S, named: str = "", pattern: str = ""
) -> tuple[Storage, list[StoredFile], Origins]:
    """Read a table that names images: where they lie, the files sorted by name, and their origins.

    Paths are absolute, or relative to the table, or to the current directory where only that file exists; over a
    network they lie below the table. A local table may name URLs, all of one place. Columns `patient`, `slide` and
    `site` are taken where they are; of a column `split` only the rows that say train, if any does. A file that is named
    twice counts once. FileNotFoundError if files are missing, ValueError if there is no column of files, rows of one
    file differ, or the split train is empty.

    Args:
        outage_s: seconds that a server may fail to answer.
        named: name of the column of files, where it is none of `FILE_COLUMNS`.
        pattern: as of `Origins`.
    """
    stored = open_storage(path, outage_s=outage_s, files=_TABLE)
    (file,) = stored.list_files()
    table = read_table(stored.read_range(file.name, 0, file.size), stored.locate(file.name))
    column = file_column(list(table), named)
    if not column:
        found = f"'{path}' has the columns {', '.join(table) or 'none'}"
        raise ValueError(f"{found}; one of files ({', '.join(FILE_COLUMNS)}), or data.image_column, is expected")
    table = pa.table({name: values for name, values in table.items() if name in (column, "split", *FIELDS)})
    table = _training(path, table.filter(pc.not_equal(table[column], "")))
    names = table[column].to_pylist()
    if not names:
        raise ValueError(f"'{path}' names no image; at least one is expected")
    storage, names = _located(path, isinstance(stored, LocalStorage), names, outage_s)
    origins = as_told({name: table[name].combine_chunks() for name in (column, *FIELDS) if name in table.column_names})
    if len(order := sorted({name: row for row, name in reversed(list(enumerate(names)))}.items())) < len(names):
        check_alike(path, names, origins)
    ordered = [name for name, _ in order]
    find = _local_files if isinstance(storage, LocalStorage) else _remote_files
    rows = np.array([row for _, row in order], np.int32)
    return storage, list(find(path, storage, ordered)), Origins(pattern, rows, origins)


def _training(path: str, table: pa.Table) -> pa.Table:
    """Rows of the training split where a column tells splits; ValueError where it tells others only."""
    if "split" not in table.column_names:
        return table
    splits = pc.utf8_lower(table["split"])
    training = pc.is_in(splits, pa.array(_TRAINING))
    if pc.any(training).as_py():
        logger.warning("'%s': %d of %d rows are of its split train", path, pc.sum(training).as_py(), len(table))
        return table.filter(training)
    if pc.any(pc.is_in(splits, pa.array(_OTHERS))).as_py():
        given = ", ".join(sorted(set(table["split"].to_pylist())))
        raise ValueError(f"'{path}' has the splits {given}; none is train: take away the column, or name rows train")
    return table


def _located(path: str, is_local: bool, names: list[str], outage_s: float) -> tuple[Storage, list[str]]:
    """Where the images of a list lie, and their names there, in the shortest form."""
    names = [name.removeprefix("file://") for name in names]
    location = os.path.dirname(path.removeprefix("file://"))
    urls = [name for name in names if "://" in name]
    if is_local and not urls:
        location = os.path.expanduser(location)
        beside = os.path.exists(os.path.join(location, os.path.expanduser(names[0]))) or not os.path.exists(names[0])
        location = (location if beside else "") or "."
        return LocalStorage(location), _below(location, names)
    if is_local:
        folders = {name.rpartition("/")[0] for name in names}
        location = os.path.commonpath(folders).replace(":/", "://", 1) if len(urls) == len(names) else ""
    elsewhere = [url for url in urls if not url.startswith(f"{location}/")]
    if "://" not in location or elsewhere:
        where = "on one server or in one bucket" if is_local else f"below '{location}'"
        raise ValueError(f"'{path}' names '{(elsewhere or urls)[0]}'; images that all lie {where} are expected")
    names = [name.removeprefix(f"{location}/").removeprefix("./") for name in names]
    return open_storage(location, outage_s=outage_s, files=IMAGES), names


def _below(location: str, names: list[str]) -> list[str]:
    """Paths below a folder in their shortest form, so that one file has one name; those elsewhere are absolute."""
    folder = os.path.abspath(location)
    found = []
    for name in names:
        if "\\" in name and not os.path.exists(os.path.join(folder, name)):
            name = name.replace("\\", "/")
        if name.startswith(("/", "~", ".")) or "/." in name or "//" in name:
            full = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
            name = full[len(folder) :].lstrip("/") if full.startswith(f"{folder}/") else full
        found.append(name)
    return found


def _local_files(path: str, storage: Storage, names: list[str]) -> Iterator[StoredFile]:
    missing = []
    for name in names:
        try:
            status = os.stat(storage.locate(name))
            yield StoredFile(name, status.st_size, str(status.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            missing.append(storage.locate(name))
    if missing:
        raise _missing(path, missing, len(names))


def _remote_files(path: str, storage: Storage, names: list[str]) -> list[StoredFile]:
    if isinstance(storage, ObjectStorage) and storage.location.startswith("http"):  # servers list no folders
        return storage.describe(names)
    found = {file.name: file for file in storage.list_files()}
    if missing := [name for name in names if name not in found]:
        raise _missing(path, [storage.locate(name) for name in missing], len(names))
    return [found[name] for name in names]


def _missing(path: str, missing: list[str], total: int) -> FileNotFoundError:
    found = f"{len(missing)} of {total} images of '{path}' do not exist, the first is '{missing[0]}'"
    return FileNotFoundError(f"{found}; paths are relative to the table")
