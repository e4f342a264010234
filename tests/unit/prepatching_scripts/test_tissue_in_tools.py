"""Every tool takes the tissue rule by name: an IHC slide through lists, shards, embedding and online patching."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2.build.data import open_data
from dinov2.configs import load_config
from prepatching_scripts.create_sample_dataset_txt import main as create_list
from tests.helpers.builder_process import build
from tests.helpers.embedding import embed, make_teacher
from tests.helpers.slides import MakeSlide

BROWN, GLASS = (150, 100, 50), (244, 243, 242)
LEFT = {"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 1024], [0, 1024], [0, 0]]]}


@pytest.fixture
def slide(make_slide: MakeSlide, tmp_path: Path) -> Path:
    """DAB on the right half; a mask marks the left half."""
    image = np.full((1024, 1024, 3), GLASS, np.uint8)
    image[:, 512:] = BROWN
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/ihc.geojson").write_text(json.dumps(LEFT))
    return make_slide("ihc.svs", "|AppMag = 20|MPP = 0.5", image)


RULES = {"otsu": ["--tissue", "otsu"], "mask": ["--tissue", "mask", "--mask-folder", "{masks}"],
         "none": ["--tissue", "none"]}  # fmt: skip
# Fraction of tiles on the right half.
RIGHT = {"otsu": (0.99, 1), "mask": (0, 0.01), "none": (0.1, 0.9)}


def options(rule: str, slide: Path) -> list[str]:
    return [word.replace("{masks}", str(slide.parent / "masks")) for word in RULES[rule]]


def is_right(x: np.ndarray, side: int) -> float:
    """Fraction of tiles whose centre is on the right half."""
    return float((np.asarray(x) + side / 2 > 512).mean())


@pytest.mark.parametrize("rule", RULES)
def test_lists_and_shards(slide: Path, tmp_path: Path, rule: str) -> None:
    listed = tmp_path / "list.txt"
    drawn = ["--levels", "0", "--tile-size", "128", "--per-level", "20", "--workers", "1"]
    assert create_list([str(slide), "--output", str(listed), *drawn, *options(rule, slide)]) == 0
    lines = listed.read_text().splitlines()
    assert len(lines) == 20
    assert RIGHT[rule][0] <= is_right([int(line.split()[-3]) for line in lines], 128) <= RIGHT[rule][1]
    assert build(listed, tmp_path / "shards", "--tile-size", "128") == 0
    fractions = np.array(pq.read_table(tmp_path / "shards")["tissue_frac"].to_pylist())
    assert (fractions > 0.6).all() and (rule != "none" or (fractions == 1).all())
    assert build(listed, tmp_path / "other", "--tile-size", "128", "--tissue", "hsv") == 0
    assert max(pq.read_table(tmp_path / "other")["tissue_frac"].to_pylist()) < 0.1


def test_the_published_rule_misses_it_and_says_so(slide: Path, tmp_path: Path, caplog) -> None:
    listed = tmp_path / "list.txt"
    assert create_list([str(slide), "--output", str(listed), "--levels", "0", "--workers", "1"]) == 1
    doubts = [record for record in caplog.records if "otsu" in record.getMessage()]
    assert len(doubts) == 1 and str(slide) in doubts[0].getMessage()


def test_a_slide_without_a_mask_fails_by_name(slide: Path, tmp_path: Path) -> None:
    (slide.parent / "masks/ihc.geojson").unlink()
    listed = tmp_path / "list.txt"
    assert create_list([str(slide), "--output", str(listed), "--workers", "1", *options("mask", slide)]) == 1
    failed = json.loads(Path(f"{listed}.failures.jsonl").read_text())
    assert failed["slide"] == str(slide) and "mask" in failed["reason"]
    assert create_list([str(slide), "--output", str(tmp_path / "x"), "--tissue", "mask"]) == 2
    assert create_list([str(slide), "--output", str(tmp_path / "x"), "--tissue", "hvs"]) == 2


def test_embedding(slide: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path)
    for rule in RULES:
        output = embed(teacher, slide, tmp_path / rule, "--mpp", 0.5, "--tile-size", 56, *options(rule, slide))
        x = pq.read_table(output)["x"].to_numpy()
        assert len(x) > 50 and RIGHT[rule][0] <= is_right(x, 56) <= RIGHT[rule][1]


@pytest.mark.parametrize("rule", ["hsv", *RULES])
def test_online_patching(slide: Path, tmp_path: Path, rule: str) -> None:
    given = [f"online.tissue={rule}"] + [f"online.tissue_options.mask.folder={slide.parent}/masks"] * (rule == "mask")
    config = load_config(None, [f"data.path={slide}", "online.mpp=[0.5]", f"online.cache_dir={tmp_path}/cache",
                                "data.tile_size=128", *given])  # fmt: skip
    if rule == "hsv":
        with pytest.raises(ValueError, match="no tissue"):
            open_data(config)
        return
    source = open_data(config).source
    x = [source.draw(number).column for number in range(300)]
    low, high = RIGHT[rule]
    assert low - 0.15 <= is_right(x, 128) <= high + 0.15  # a tile may hold 60 % of glass
