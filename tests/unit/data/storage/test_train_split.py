"""The files chosen are those that `datasets` itself would stream."""

from pathlib import Path

import fsspec
import pytest

from dinov2.build.data import recognise
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.train_split import find_train_files

CARD = """---
license: mit
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: full
  default: true
  data_files:
  - split: train
    path: [one/*.parquet, two/*.parquet]
  - split: test
    path: three/*.parquet
---
Tiles.
"""
FOLDER_CARD = "---\nconfigs:\n- config_name: default\n  data_dir: frozen\n---\n"
LAYOUTS = {
    "numbered": (
        "",
        [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/extra-00000-of-00001.parquet",
        ],
        2,
    ),
    "folders": ("", ["train/a.parquet", "x/train/b.parquet", "test/a.parquet", "other.parquet"], 2),
    "names": ("", ["a_train_1.parquet", "training.parquet", "val.parquet", "x.parquet"], 2),
    "slides": ("No front matter.", ["TCGA-02-0001-01Z-00-DX1.parquet", "b/TCGA-02-0002.parquet"], 2),
    "special": ("", ["__cache__/b.parquet", "__c.parquet", "a__b/__d/c.parquet", "x__y/d.parquet"], 2),
    "hidden": ("", [".git/train.parquet", "__cache__/train/b.parquet", "train/c.parquet"], 1),
    "card": (
        CARD,
        ["one/a.parquet", "two/b.parquet", "three/c.parquet", "small/d.parquet", "train.parquet"],
        2,
    ),
    "spellings": (
        "",
        ["a.training.parquet", "b-training-1.parquet", "c_train.parquet", "d-testing.parquet", "dev.parquet"],
        3,
    ),
    "evaluation": ("", ["x/training/a.parquet", "x/evaluation/b.parquet", "valid/c.parquet", "train-d.parquet"], 1),
    "inside words": ("", ["strain-7.parquet", "retrained.parquet", "contest.parquet"], 3),
    "card folder": (FOLDER_CARD, ["frozen/a.parquet", "frozen/train.parquet", "b.parquet"], 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_that_datasets_takes(tmp_path: Path, layout: str) -> None:
    from datasets import load_dataset_builder

    card, names, count = LAYOUTS[layout]
    for name in names:
        path = tmp_path / "tiles" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "tiles/README.md").write_text(card)
    builder = load_dataset_builder(str(tmp_path / "tiles"), cache_dir=str(tmp_path / "cache"))
    expected = sorted(str(Path(path).relative_to(tmp_path / "tiles")) for path in builder.config.data_files["train"])
    assert len(expected) == count
    assert find_train_files("org/tiles", names, card) == expected


@pytest.mark.parametrize(
    ("card", "names", "message"),
    [
        ("", ["test/a.parquet", "val/b.parquet"], "has the splits .*test.*, none is train"),
        (
            CARD.replace("  default: true\n", ""),
            ["one/a.parquet"],
            "has the configurations small, full, no default",
        ),
        (CARD.replace("one/", "/etc/"), ["one/a.parquet"], r"names files elsewhere, '/etc/\*.parquet'"),
        (CARD.replace("one/", "../one/"), ["one/a.parquet"], "names files elsewhere"),
        (CARD.replace("one/", "https://x.example/"), ["one/a.parquet"], "names files elsewhere"),
        ("---\nconfigs: 3\n---\n", ["a.parquet"], "cannot be understood"),
        ("---\na: [\n---\n", ["a.parquet"], "cannot be understood"),
    ],
)
def test_what_leaves_the_files_open_is_refused(card: str, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_train_files("org/tiles", names, card)
    assert "name the files instead, as in hf://datasets/org/tiles/folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_lead_out_of_the_dataset_are_left_out(tmp_path: Path) -> None:
    outside = tmp_path / "out.parquet"
    assert find_train_files("org/tiles", [str(outside), "../../out.parquet", "a.parquet"], "") == ["a.parquet"]
    assert not outside.exists()


def test_what_is_left_out_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    find_train_files("org/tiles", ["data/train-0.parquet", "data/test-0.parquet", "data/val-0.parquet"], "")
    (record,) = caplog.records
    assert "data/test-0.parquet, data/val-0.parquet" in record.getMessage()
    caplog.clear()
    find_train_files("org/tiles", ["a.parquet", "b.parquet"], "")
    assert not caplog.records


def test_no_keyword_of_datasets_is_overlooked() -> None:
    from datasets.data_files import SPLIT_KEYWORDS

    names = [f"{word}.parquet" for words in SPLIT_KEYWORDS.values() for word in words]
    train = [f"{word}.parquet" for word in SPLIT_KEYWORDS["train"]]
    for name in set(names) - set(train):
        assert find_train_files("org/tiles", [*train, name], "") == sorted(train)


@pytest.mark.parametrize("remote", [False, True])
def test_folders_are_split_as_the_hub_is_where_that_is_asked_for(tmp_path: Path, remote: bool) -> None:
    layout = ["data/train-0.parquet", "data/train-1.pq", "data/test-0.parquet", "data/validation-a.parquet"]
    folder = f"memory://{tmp_path.name}-split" if remote else str(tmp_path / "set")
    for name in layout:
        with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"x")

    def names(location: str, **options: bool) -> list[str]:
        return [file.name for file in open_storage(location, **options).list_files()]

    assert names(folder) == sorted(layout)
    assert names(folder, train_only=True) == layout[:2]
    assert names(f"{folder}/data", train_only=True) == ["train-0.parquet", "train-1.pq"]
    assert names(f"{folder}/**/*.parquet", train_only=True) == [n for n in sorted(layout) if n.endswith(".parquet")]
    assert names(f"{folder}/data/test-0.parquet", train_only=True) == ["test-0.parquet"]
    with fsspec.open(f"{folder}/README.md", "w") as file:
        file.write("---\nconfigs:\n- config_name: default\n  data_files: data/val*\n---\n")
    assert names(folder, train_only=True) == ["data/validation-a.parquet"]
    with fsspec.open(f"{folder}/README.md", "w") as file:
        file.write("---\nlicense: mit\n---\n")
    assert names(folder, train_only=True) == layout[:2]


@pytest.mark.parametrize("suffix", [".pq", ".PARQUET", ".Parquet", ".PQ"])
def test_other_endings_are_found(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "deep").mkdir()
    for name in (f"a{suffix}", f"deep/b{suffix}", f".c{suffix}", f"d{suffix}.tmp", "e.csv"):
        (tmp_path / name).touch()
    assert [file.name for file in open_storage(str(tmp_path)).list_files()] == [f"a{suffix}", f"deep/b{suffix}"]
    assert recognise(str(tmp_path)) == "parquet"


def test_no_file_is_no_error() -> None:
    assert find_train_files("org/tiles", [], "") == []


def test_splits_in_capitals() -> None:
    names = ["Train/a.parquet", "Test/a.parquet", "VAL/a.parquet"]
    assert find_train_files("set", names, "") == ["Train/a.parquet"]
    assert find_train_files("set", ["A/x.parquet", "B/x.parquet"], "") == ["A/x.parquet", "B/x.parquet"]
    assert find_train_files("set", ["a/X.parquet", "a/x.parquet"], "") == ["a/X.parquet", "a/x.parquet"]
