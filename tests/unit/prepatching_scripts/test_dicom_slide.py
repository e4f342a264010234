"""A DICOM slide of two files goes through every tool as one slide of its patient."""

from pathlib import Path

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest

from dinov2.build.data import open_data
from dinov2.configs import load_config
from dinov2.data.online.from_list import SlideListSource
from dinov2.data.source import Origin, origins_of
from prepatching_scripts.create_sample_dataset_txt import main as create_list
from tests.helpers.builder_process import build
from tests.helpers.dicom import write_slide
from tests.helpers.embedding import embed, make_teacher

NOISE = np.random.default_rng(0).integers(-30, 30, (1024, 1024, 3))
PINK = (np.array((215, 150, 190)) + NOISE).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of two patients; the paths tell neither."""
    folder = tmp_path_factory.mktemp("dicom")
    for number in (1, 2):
        write_slide(
            folder / f"s{number}", np.roll(PINK, number, axis=0), series=f"1.2.{number}", PatientID=f"P-{number}"
        )
    return folder


@pytest.fixture(scope="module")
def listed(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "list.txt"
    assert create_list([str(slides), "--output", str(path), "--levels", "0", "--per-level", "5", "--workers", "1"]) == 0
    return path


def test_lists_and_shards(slides: Path, listed: Path, tmp_path: Path) -> None:
    lines = listed.read_text().splitlines()
    assert len(lines) == 10 and {line.split()[0] for line in lines} == {f"{slides}/s{n}/0.dcm" for n in (1, 2)}
    for name, options in (("plain", []), ("shuffled", ["--shuffle", "--rows-per-shard", "6"])):
        assert build(listed, tmp_path / name, *options) == 0
        rows = pq.read_table(tmp_path / name).to_pylist()
        assert len(rows) == 10
        assert {(Path(row["slide_path"]).parent.name, row["patient"]) for row in rows} == {("s1", "P-1"), ("s2", "P-2")}


def test_a_list_of_several_files_of_one_slide_is_of_one_patient(slides: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    names = (f"{slides}/s1/1.dcm", f"{slides}/s1/0.dcm", f"{slides}/s2/0.dcm")
    listed.write_text("".join(f"{name} 0 0 0\n" for name in names))
    source = SlideListSource(listed)
    assert origins_of(source, 0) == [Origin(names[1], "P-1"), Origin(names[1], "P-1"), Origin(names[2], "P-2")]
    with openslide.OpenSlide(names[0]) as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, (224, 224)))[..., :3]
    [(name, data)] = source.read(0, [0])
    assert name == names[0]  # as it is listed
    sample = type("Sample", (), {"slide": name, "data": data})
    np.testing.assert_array_equal(source.decode(sample), expected)


@pytest.mark.parametrize("what", ["slides", "list", "shards"])
def test_exclusion_by_patient(slides: Path, listed: Path, tmp_path: Path, what: str) -> None:
    if what == "shards":
        assert build(listed, tmp_path / "shards") == 0
    path = {"slides": slides, "list": listed, "shards": tmp_path / "shards"}[what]
    (tmp_path / "excluded.txt").write_text("P-1\n")
    options = ["data.path=" + str(path), f"data.exclusion_file={tmp_path}/excluded.txt", "online.mpp=[0.5]"]
    config = load_config(None, [*options, f"online.cache_dir={tmp_path}/cache"])
    source = open_data(config).source
    used = {name for group in range(min(4, len(source.group_rows))) for name in source.slides(group)}
    assert {Path(name).parent.name for name in used} == {"s2"}


def test_embedding(slides: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path)
    output = embed(teacher, slides, tmp_path / "out", "--mpp", 1, "--tile-size", 56)
    assert len(list(output.glob("*.parquet"))) == 2
