"""Files of embeddings, Parquet or HDF5, which appear when they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.images.hdf5 import import_h5py
from dinov2.utils.files import replacing

ENDINGS = {"parquet": ".parquet", "hdf5": ".h5"}
STORED = {"fp16": np.float16, "fp32": np.float32}
_ROWS_PER_GROUP = 1024
_COLUMNS = {
    "name": "string", "slide": "string", "x": "int64", "y": "int64", "level": "int32", "mpp": "float32",
    "tile_size": "int32",
}  # fmt: skip

Columns = dict[str, Sequence[Any]]


@contextmanager
def embedding_file(path: Path, width: int, stored: str) -> Iterator[EmbeddingFile]:
    """Write a file that gets its name when the block ends well; its ending tells the format.

    Rows are added by ``append``: values of some columns, and embeddings (N, width) of the dtype that is ``stored``,
    N > 0. ``finish`` writes what is waiting, and JSON notes about the file.
    """
    with replacing(path) as partial:
        if path.suffix == ENDINGS["hdf5"]:
            with import_h5py().File(partial, "w") as file:
                yield _Hdf5File(file, width, STORED[stored])
            return
        embedding = pa.list_(pa.from_numpy_dtype(STORED[stored]), width)
        schema = pa.schema([*_COLUMNS.items(), ("embedding", embedding)])
        repeated = ["slide", "level", "mpp", "tile_size"]
        with pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=repeated) as writer:
            yield _ParquetFile(writer, schema)


class _ParquetFile:
    """Row groups of 1024 rows, whatever is appended at a time."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._waiting = [schema.empty_table()]

    def append(self, columns: Columns, embeddings: np.ndarray) -> None:
        nulls = [None] * len(embeddings)
        arrays = [pa.array(columns.get(name, nulls), kind) for name, kind in _COLUMNS.items()]
        values = pa.array(embeddings.ravel())
        arrays.append(pa.FixedSizeListArray.from_arrays(values, type=self._schema.field("embedding").type))
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        if sum(map(len, self._waiting)) >= _ROWS_PER_GROUP:
            self._write(least=_ROWS_PER_GROUP)

    def finish(self, notes: dict[str, Any]) -> None:
        self._write(least=1)
        self._writer.add_key_value_metadata({key: json.dumps(value) for key, value in notes.items()})

    def _write(self, least: int) -> None:
        table = pa.concat_tables(self._waiting)
        while len(table) >= least:
            self._writer.write_table(table.slice(0, _ROWS_PER_GROUP), _ROWS_PER_GROUP)
            table = table.slice(_ROWS_PER_GROUP)
        self._waiting = [table]


class _Hdf5File:
    """TRIDENT's layout, which CLAM reads too: `features` (N, D) and `coords` (N, 2), int64 level-0 px.

    The attributes of `coords` have TRIDENT's names. Images and rows have a `name`; an unknown coordinate is -1.
    """

    def __init__(self, file: Any, width: int, dtype: type) -> None:
        self._file = file
        self._extend("features", np.empty((0, width), dtype))

    def append(self, columns: Columns, embeddings: np.ndarray) -> None:
        self._extend("features", embeddings)
        if "name" in columns:
            self._extend("name", np.array(columns["name"], object), import_h5py().string_dtype())
        if "x" in columns:
            pairs = zip(columns["x"], columns["y"], strict=True)
            self._extend("coords", np.array([[-1 if v is None else v for v in pair] for pair in pairs], np.int64))

    def finish(self, notes: dict[str, Any]) -> None:
        for key, value in notes.items():  # not as attributes, which hold 64 kB at most
            self._file[key] = json.dumps(value)
        about = notes["part"]
        if "slide_mpp" in about:
            self._extend("coords", np.empty((0, 2), np.int64))
            self._file["coords"].attrs.update(
                patch_size=about["tile_size"],
                patch_size_level0=about["tile_size_level0"],
                level0_magnification=round(10 / about["slide_mpp"]),
                target_magnification=round(10 / about["mpp"], 3),
                overlap=about["tile_size"] - about["stride"],
                name=about["slide"],
            )

    def _extend(self, name: str, rows: np.ndarray, dtype: Any = None) -> None:
        """Append rows to a dataset, which is begun where there is none."""
        if name not in self._file:
            self._file.create_dataset(
                name, (0, *rows.shape[1:]), dtype or rows.dtype,
                maxshape=(None, *rows.shape[1:]), chunks=(_ROWS_PER_GROUP, *rows.shape[1:]),
            )  # fmt: skip
        if len(rows):
            dataset, start = self._file[name], len(self._file[name])
            dataset.resize(start + len(rows), axis=0)
            dataset[start:] = rows


EmbeddingFile = _ParquetFile | _Hdf5File
