"""Public benchmarks of labelled tiles with the splits under which results are published."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.images.hdf5 import import_h5py
from dinov2.eval.datasets.images import ImageFiles, UnreadableImage
from dinov2.eval.datasets.labels import LabelledTiles

_BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
# kaiko-eva's patient-wise split of the 400 images in order of class and name; half-open.
_BACH_TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))
_BREAKHIS_CLASSES = ("TA", "MC", "F", "DC")
_BREAKHIS_IMAGES = {"train": 1132, "test": 339}
# kaiko-eva's validation patients.
_BREAKHIS_TEST = {
    "18842D", "19979", "15275", "15792", "16875", "3909", "5287", "16716", "2773", "5695", "16184CD", "23060CD",
    "21998CD", "21998EF",
}  # fmt: skip


def open_bach(root: str | Path) -> LabelledTiles:
    """BACH (ICIAR 2018): 400 images of 4 classes, 268 to train and 132 to test on, the split of kaiko-eva.

    The folder may be the one that holds ``ICIAR2018_BACH_Challenge``, that one, or its ``Photos``.
    """
    root = Path(root)
    candidates = (root / "ICIAR2018_BACH_Challenge" / "Photos", root / "Photos", root)
    photos = next((path for path in candidates if (path / _BACH_CLASSES[0]).is_dir()), None)
    if photos is None:
        raise FileNotFoundError(
            f"BACH is not in '{root}'; ICIAR2018_BACH_Challenge/Photos/{{{','.join(_BACH_CLASSES)}}} is expected."
        )
    names = [f"{name}/{path.name}" for name in _BACH_CLASSES for path in sorted((photos / name).glob("*.tif"))]
    if len(names) != 400:
        raise ValueError(f"BACH in '{photos}' has {len(names)} .tif images; its split needs all 400.")
    labels = np.array([_BACH_CLASSES.index(name.partition("/")[0]) for name in names], np.int64)
    splits = ["test"] * len(names)
    for first, end in _BACH_TRAIN:
        splits[first:end] = ["train"] * (end - first)
    return LabelledTiles(ImageFiles(photos, names), labels, _BACH_CLASSES, splits=tuple(splits))


def open_breakhis(root: str | Path) -> LabelledTiles:
    """BreaKHis at 40X: tubular adenoma, mucinous and ductal carcinoma, fibroadenoma; kaiko-eva's patient split.

    Images of the folder are ``**/40X/SOB_<B|M>_<class>-<year>-<patient>-40-<number>.png``.
    """
    root = Path(root)
    found = sorted(path.relative_to(root).as_posix() for path in root.glob("**/40X/*.png"))
    if not found:
        raise FileNotFoundError(f"BreaKHis is not in '{root}'; folders 40X with .png images are expected in it.")
    parts = {name: name.rpartition("/")[2].split("-") for name in found}
    if wrong := [name for name in found if len(parts[name]) != 5]:
        raise ValueError(f"Image '{root / wrong[0]}' is not named SOB_<B|M>_<class>-<year>-<patient>-40-<number>.png.")
    class_of = {name: parts[name][0].rpartition("_")[2] for name in found}
    names = [name for name in found if class_of[name] in _BREAKHIS_CLASSES]
    patients = tuple(parts[name][2] for name in names)
    splits = tuple("test" if patient in _BREAKHIS_TEST else "train" for patient in patients)
    counts = {split: splits.count(split) for split in _BREAKHIS_IMAGES}
    if counts != _BREAKHIS_IMAGES:
        raise ValueError(
            f"BreaKHis in '{root}' has {counts} images at 40X of its 4 classes; {_BREAKHIS_IMAGES} expected."
        )
    labels = np.array([_BREAKHIS_CLASSES.index(class_of[name]) for name in names], np.int64)
    return LabelledTiles(ImageFiles(root, names), labels, _BREAKHIS_CLASSES, patients=patients, splits=splits)


def open_pcam(root: str | Path) -> LabelledTiles:
    """PatchCamelyon with its own split: 262,144 tiles to train, 32,768 to choose and 32,768 to test on.

    The folder holds ``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``. ImportError: if h5py is missing.
    """
    root, names = Path(root), {"train": "train", "val": "valid", "test": "test"}
    files = {key: [root / f"camelyonpatch_level_2_split_{name}_{key}.h5" for name in names.values()] for key in "xy"}
    if absent := [path for path in (*files["x"], *files["y"]) if not path.is_file()]:
        raise FileNotFoundError(f"PCam in '{root}' lacks {absent[0].name}; its six unpacked .h5 files are expected.")
    labels = [_open(path, "y")[:].reshape(-1).astype(np.int64) for path in files["y"]]
    images, counts = _Hdf5Tiles(files["x"]), list(map(len, labels))
    if images.counts != counts:
        raise ValueError(f"PCam in '{root}' has {images.counts} tiles, but {counts} labels.")
    splits = tuple(np.repeat(list(names), counts).tolist())
    return LabelledTiles(images, np.concatenate(labels), ("no_tumor", "tumor"), splits=splits)


class _Hdf5Tiles:
    """Tiles of HDF5 files, one after the other; ``x`` of each is uint8 (N, H, W, 3)."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._arrays = [_open(path, "x") for path in paths]
        self.counts = [len(array) for array in self._arrays]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        file, row = self._find(index)
        return f"row {row} of {self._paths[file]}"

    def read(self, index: int) -> np.ndarray:
        file, row = self._find(index)
        try:
            return self._arrays[file][row]
        except (OSError, RuntimeError) as error:
            raise UnreadableImage(f"Image in {self.name(index)} cannot be read: {error}.") from error

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file]) + self.counts[file]


def _open(path: Path, key: str) -> Any:
    h5py = import_h5py()
    try:
        return h5py.File(path, "r")[key]
    except (OSError, KeyError) as error:
        raise ValueError(f"File '{path}' is no HDF5 file with an array {key!r} ({error}).") from error


BENCHMARKS: dict[str, Callable[[str | Path], LabelledTiles]] = {
    "bach": open_bach, "breakhis": open_breakhis, "pcam": open_pcam,
}  # fmt: skip
"""By name; FileNotFoundError or ValueError say where a folder does not have the layout."""
