"""The files chosen are those that `datasets` itself would stream."""

from pathlib import Path

import pytest

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


def test_no_file_is_no_error() -> None:
    assert find_train_files("org/tiles", [], "") == []
