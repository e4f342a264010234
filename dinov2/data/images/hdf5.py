"""HDF5 files of tiles."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov2.data.images.container import Contents, Member
from dinov2.data.storage.base import FileType, LocalStorage, Storage, StoredFile
from dinov2.utils.provenance import how_to_install

NAMES = ("imgs", "images", "image", "img", "tiles", "tile", "patches", "patch", "x", "data")
"""Last parts of the names of datasets that are looked for, in lower case, the first ones first."""

_NUMPY_HEADER = 128  # bytes
_NAMED = 8  # datasets in a message


class Hdf5Tiles:
    """HDF5 files with one dataset of tiles: uint8 (N, H, W, 3), or N encoded files of uint8.

    Where there is none of these, uint8 (N, 3, H, W), (N, H, W, 4), of which alpha is dropped, and grey (N, H, W, 1).

    ``named`` is the dataset's name, where it is none of `NAMES` and not the only one of that shape. Files must lie on a
    local disk: the library asks for a few bytes at a time, one request after the other.
    """

    files = FileType("HDF5", (".h5", ".hdf5", ".he5"))

    def __init__(self, named: str = "") -> None:
        self._named = named

    def contents(self, storage: Storage, file: StoredFile) -> Contents:
        """List the tiles of a file; ValueError if it has no such dataset or several."""
        if not isinstance(storage, LocalStorage):
            raise ValueError("HDF5 files are read from local disks only; copy them, or pack them into Parquet shards")
        with _open(storage, file) as opened:
            found: dict[str, tuple[str, Any]] = {}
            opened.visititems(lambda name, item: found.update({name: item}) if hasattr(item, "shape") else None)
            tiles = {name: item for name, item in found.items() if _holds_tiles(item)}
            if self._named or not tiles:
                tiles |= {name: item for name, item in found.items() if _holds_others(item)}
            dataset = tiles[name := self._choose(found, list(tiles))]
            size = 2 * file.size // max(1, len(dataset))  # those of encoded tiles are known to the file's heap only
            if dataset.ndim == 4:
                size = math.prod(dataset.shape[1:]) * (3 if dataset.shape[3] == 1 else 1) + _NUMPY_HEADER
            return Contents([Member(f"{name}[{row}]", row, 1, size) for row in range(len(dataset))])

    def read(self, storage: Storage, file: StoredFile, members: Sequence[Member]) -> list[bytes]:
        """Read tiles: encoded ones as they are, others in NumPy's format."""
        rows = [member.start for member in members]
        with _open(storage, file) as opened:
            dataset = opened[members[0].name.rpartition("[")[0]]
            first, last = min(rows), max(rows)
            try:
                if last - first < 2 * len(rows):
                    block = dataset[first : last + 1]
                    return [_stored(block[row - first]) for row in rows]
            except OSError:  # a corrupt chunk, which spoils no other row
                pass
            return [_one(dataset, row) for row in rows]

    def _choose(self, found: Mapping[str, Any], tiles: list[str]) -> str:
        wanted = [self._named.strip("/")] if self._named else NAMES
        for name in wanted:
            known = [full for full in tiles if name in (full, full.rpartition("/")[2], full.rpartition("/")[2].lower())]
            outermost = min((full.count("/") for full in known), default=0)
            known = [full for full in known if full == name or full.count("/") == outermost]
            if len(known) > 1 and name not in known:
                several = f"it has several datasets of one name, {', '.join(sorted(known))}"
                raise ValueError(f"{several}; one, as data.image_column says, or a file for each slide is expected")
            if known:
                return name if name in known else known[0]
        if len(tiles) == 1 and not self._named:
            return tiles[0]
        seen = [f"{name} {item.dtype} {item.shape}" for name, item in sorted(found.items())[:_NAMED]]
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        said = f"it has the datasets {', '.join(seen) or 'none'}{more}"
        if not tiles and "coords" in (name.rpartition("/")[2] for name in found):
            raise ValueError(f"{said}: positions, no tiles; train on the slides themselves, data.path=SLIDES")
        expected = "one of uint8 (N, H, W, 3), or of N encoded images, is expected"
        raise ValueError(f"{said}; {expected}, called {', '.join(NAMES)} or as data.image_column says")


def import_h5py() -> Any:
    """The h5py module; ImportError says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"HDF5 needs h5py, which is not installed; {how_to_install('hdf5')}.") from error
    return h5py


def _open(storage: Storage, file: StoredFile) -> Any:
    h5py, path = import_h5py(), storage.locate(file.name)
    try:
        return h5py.File(path, "r", locking=False)  # many network disks have no locks
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it is no HDF5 file ({' '.join(str(error).split())})") from error


def _holds_tiles(dataset: Any) -> bool:
    if dataset.ndim == 4:
        return dataset.dtype == np.uint8 and dataset.shape[3] == 3 and 0 not in dataset.shape[1:]
    element = import_h5py().check_vlen_dtype(dataset.dtype)
    return dataset.ndim == 1 and element is not None and element is not str and np.dtype(element) == np.uint8


def _holds_others(dataset: Any) -> bool:
    """Whether a dataset has tiles with alpha, grey ones, or channels first."""
    is_image = dataset.ndim == 4 and dataset.dtype == np.uint8 and 0 not in dataset.shape[1:] and dataset.shape[3] != 3
    return is_image and (dataset.shape[3] in (1, 4) or dataset.shape[1] == 3)


def _one(dataset: Any, row: int) -> bytes:
    try:
        return _stored(dataset[row])
    except OSError:
        return b""


def _stored(tile: np.ndarray) -> bytes:
    if tile.ndim == 1:
        return tile.tobytes()
    if tile.shape[2] in (1, 4):
        tile = np.repeat(tile, 3, axis=2) if tile.shape[2] == 1 else tile[..., :3]
    elif tile.shape[2] != 3:
        tile = np.moveaxis(tile, 0, 2)
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(tile))
    return buffer.getvalue()
