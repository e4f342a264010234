"""Registry entries on made-up trees: counts, classes and splits as published."""

import h5py
import numpy as np
import pytest

from dinov2.eval.datasets.benchmarks import BENCHMARKS

CLASSES = ("Benign", "InSitu", "Invasive", "Normal")


def make_bach(root, count=100):
    for name in CLASSES:
        folder = root / "ICIAR2018_BACH_Challenge" / "Photos" / name
        folder.mkdir(parents=True)
        for number in range(1, count + 1):
            (folder / f"{name[:2].lower()}{number:03}.tif").touch()


@pytest.mark.parametrize("below", ["", "ICIAR2018_BACH_Challenge", "ICIAR2018_BACH_Challenge/Photos"])
def test_bach(tmp_path, below):
    make_bach(tmp_path)
    tiles = BENCHMARKS["bach"](tmp_path / below)
    assert tiles.classes == CLASSES and np.bincount(tiles.labels).tolist() == [100] * 4
    splits = np.array(tiles.splits)
    assert (splits == "train").sum() == 268 and (splits == "test").sum() == 132
    # The first and last images of kaiko-eva's validation ranges, and their neighbours.
    assert np.flatnonzero(np.diff(splits == "test")).tolist() == [
        40, 58, 59, 89, 138, 168, 239, 257, 259, 272, 344, 367,
    ]  # fmt: skip
    assert tiles.images.name(41).endswith("Benign/be042.tif") and splits[41] == "test"


def test_bach_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"BACH is not in .*Photos/\{Benign,InSitu,Invasive,Normal\} is exp"):
        BENCHMARKS["bach"](tmp_path)
    make_bach(tmp_path, 99)
    with pytest.raises(ValueError, match=r"has 396 \.tif images; its split needs all 400"):
        BENCHMARKS["bach"](tmp_path)


def make_breakhis(root, drop=0):
    """Three training patients with 1132 images and the test patients with 339, of BreaKHis's names."""
    test = [
        "18842D",
        "19979",
        "15275",
        "15792",
        "16875",
        "3909",
        "5287",
        "16716",
        "2773",
        "5695",
        "16184CD",
        "23060CD",
        "21998CD",
        "21998EF",
    ]
    kinds = ["benign/SOB/adenosis", "benign/SOB/fibroadenoma", "malignant/SOB/ductal_carcinoma"]
    patients = [(f"2{i}", 283) for i in range(4)] + [(name, 25 if i < 3 else 24) for i, name in enumerate(test)]
    short = sum(count for _, count in patients[4:]) - 339
    patients[-1] = (test[-1], 24 - short)
    for index, (patient, count) in enumerate(patients):
        name = ["TA", "MC", "F", "DC"][index % 4]
        for magnification in ("40", "100"):
            folder = root / "histology_slides" / kinds[index % 3] / f"SOB_{patient}" / f"{magnification}X"
            folder.mkdir(parents=True)
            for number in range(count - (drop if index == 0 else 0)):
                (folder / f"SOB_{'BM'[index % 2]}_{name}-14-{patient}-{magnification}-{number:03}.png").touch()
    other = root / "histology_slides" / "A" / "40X"
    other.mkdir(parents=True)
    (other / "SOB_B_A-14-22549AB-40-001.png").touch()  # adenosis is not among the four


def test_breakhis(tmp_path):
    make_breakhis(tmp_path)
    tiles = BENCHMARKS["breakhis"](tmp_path)
    splits = np.array(tiles.splits)
    assert tiles.classes == ("TA", "MC", "F", "DC")
    assert (splits == "train").sum() == 1132 and (splits == "test").sum() == 339
    patients = np.array(tiles.patients)
    assert len(set(patients[splits == "test"])) == 14
    assert not set(patients[splits == "test"]) & set(patients[splits == "train"])
    assert all("/40X/" in name for name in tiles.images.names)


def test_breakhis_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="BreaKHis is not in"):
        BENCHMARKS["breakhis"](tmp_path)
    make_breakhis(tmp_path, drop=1)
    with pytest.raises(ValueError, match=r"has \{'train': 1131, 'test': 339\} images at 40X"):
        BENCHMARKS["breakhis"](tmp_path)
    (tmp_path / "histology_slides" / "A" / "40X" / "tile.png").touch()
    with pytest.raises(ValueError, match=r"Image '.*tile.png' is not named SOB_"):
        BENCHMARKS["breakhis"](tmp_path)


def make_pcam(root, counts=(6, 4, 2)):
    rng = np.random.default_rng(0)
    for part, count in zip(("train", "valid", "test"), counts, strict=True):
        images = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
        for key, array in (("x", images), ("y", labels)):
            with h5py.File(root / f"camelyonpatch_level_2_split_{part}_{key}.h5", "w") as file:
                file[key] = array


def test_pcam(tmp_path):
    make_pcam(tmp_path)
    tiles = BENCHMARKS["pcam"](tmp_path)
    assert tiles.splits == ("train",) * 6 + ("val",) * 4 + ("test",) * 2
    assert tiles.labels.tolist() == [0, 1] * 6
    with h5py.File(tmp_path / "camelyonpatch_level_2_split_valid_x.h5") as file:
        np.testing.assert_array_equal(tiles.images.read(7), file["x"][1])
    assert tiles.images.name(7) == f"row 1 of {tmp_path}/camelyonpatch_level_2_split_valid_x.h5"


def test_pcam_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"lacks camelyonpatch_level_2_split_train_x.h5; its six unpacked"):
        BENCHMARKS["pcam"](tmp_path)
    make_pcam(tmp_path)
    with h5py.File(tmp_path / "camelyonpatch_level_2_split_test_y.h5", "w") as file:
        file["y"] = np.zeros((3, 1, 1, 1), np.uint8)
    with pytest.raises(ValueError, match=r"has \[6, 4, 2\] tiles, but \[6, 4, 3\] labels"):
        BENCHMARKS["pcam"](tmp_path)
    (tmp_path / "camelyonpatch_level_2_split_train_y.h5").write_bytes(b"gzip?")
    with pytest.raises(ValueError, match=r"split_train_y.h5' is no HDF5 file with an array 'y'"):
        BENCHMARKS["pcam"](tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(
        ImportError, match=r"needs h5py, which is not installed; PATHFM_EXTRAS=dev,slides,hdf5 \./install\.sh"
    ):
        BENCHMARKS["pcam"](tmp_path)
