"""PatchCamelyon: tiles in HDF5 files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.eval.datasets.images import UnreadableImage
from dinov2.eval.datasets.labelled import LabelledTiles

_SPLITS = {"train": "train", "val": "valid", "test": "test"}
_CLASSES = ("no_tumor", "tumor")


def open_pcam(root: str | Path) -> LabelledTiles:
    """PatchCamelyon with its own split: 262,144 tiles to train, 32,768 to choose and 32,768 to test on.

    Args:
        root: folder of ``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``.

    Raises:
        FileNotFoundError, ValueError: files are missing or do not fit together.
        ImportError: h5py is not installed.
    """
    root = Path(root)
    files = {
        split: [root / f"camelyonpatch_level_2_split_{name}_{key}.h5" for key in "xy"]
        for split, name in _SPLITS.items()
    }
    if absent := [path for pair in files.values() for path in pair if not path.is_file()]:
        raise FileNotFoundError(
            f"PCam in '{root}' lacks {absent[0].name}; its six unpacked .h5 files are expected."
        )
    labels, splits = [], []
    for split, (_, path) in files.items():
        labels.append(_open(path, "y")[:].reshape(-1).astype(np.int64))
        splits += [split] * len(labels[-1])
    images = Hdf5Tiles([pair[0] for pair in files.values()])
    if images.counts != [len(part) for part in labels]:
        raise ValueError(f"PCam in '{root}' has {images.counts} tiles, but {list(map(len, labels))} labels.")
    return LabelledTiles(images, np.concatenate(labels), _CLASSES, splits=tuple(splits))


class Hdf5Tiles:
    """Tiles of HDF5 files, one after the other; ``x`` of each is uint8 (N, H, W, 3).

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        self._arrays = [_open(path, "x") for path in paths]
        self.counts = [len(array) for array in self._arrays]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """File and row."""
        file, row = self._find(index)
        return f"row {row} of {self.paths[file]}"

    def read(self, index: int) -> np.ndarray:
        """One tile, uint8 (H, W, 3) RGB."""
        file, row = self._find(index)
        try:
            return self._arrays[file][row]
        except (OSError, RuntimeError) as error:
            raise UnreadableImage(f"Image in {self.name(index)} cannot be read: {error}.") from error

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file]) + self.counts[file]


def _open(path: Path, key: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "PCam's files need h5py: install the extra 'hdf5' (pip install 'path-fm[hdf5]')."
        ) from error
    try:
        return h5py.File(path, "r")[key]
    except (OSError, KeyError) as error:
        raise ValueError(f"File '{path}' is no HDF5 file with an array {key!r} ({error}).") from error
