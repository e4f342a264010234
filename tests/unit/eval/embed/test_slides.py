"""`python -m dinov2.eval.embed` on slides: which tiles, their pixels and places; and bad input of all kinds."""

import json
import os
import sys

import cv2
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from skimage.measure import block_reduce

from prepatching_scripts.make_demo_slide import make_demo_slides
from tests.helpers.embedding import MEAN, contents, embed, expected, make_teacher, refused, rows_of
from tests.helpers.slides import real_slide


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Its file and backbone."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """The demo's two slides, 0.25 um/px at level 0, downsampled by 1, 2 and 4."""
    return make_demo_slides(tmp_path_factory.mktemp("slides"))[0].parent


def grid(slide, mpp, size, stride, least):
    """Corners (x, y) of the tissue tiles of a demo slide, from tifffile's pixels: squares of 32 level-0 px are
    counted on means of 16 x 16 px, tile by tile."""
    with tifffile.TiffFile(slide) as tiff:
        levels = [page.asarray() for page in tiff.pages if page.is_tiled]
    means = np.rint(block_reduce(levels[0], (16, 16, 1), np.mean)).astype(np.uint8)
    hsv = cv2.cvtColor(means, cv2.COLOR_RGB2HSV)
    tissue = ((hsv >= (90, 8, 103)) & (hsv <= (180, 255, 255))).all(2)
    downsample = 2 if mpp >= 0.5 else 1
    height, width = (side // downsample for side in levels[0].shape[:2])
    side = round(size * mpp / 0.25 / downsample)
    places, row = [], 0
    while (top := round(row * stride * mpp / 0.25 / downsample)) + side <= height:
        column = 0
        while (left := round(column * stride * mpp / 0.25 / downsample)) + side <= width:
            edges = [round(edge * downsample / 32) * 2 for edge in (top, top + side, left, left + side)]
            square = tissue[edges[0] : edges[1], edges[2] : edges[3]]
            if square.sum() >= least * (edges[1] - edges[0]) * (edges[3] - edges[2]):
                places.append((left * downsample, top * downsample))
            column += 1
        row += 1
    return places, levels[downsample // 2]


@pytest.mark.parametrize(("mpp", "stride", "least"), [(0.5, 56, 0.4), (0.5, 100, 0.8), (0.6, 90, 0.4), (0.25, 112, 0)])
def test_slide_grid(teacher, slides, tmp_path, mpp, stride, least):
    slide = slides / "demo_train.svs"
    options = ["--mpp", mpp, "--tile-size", 56, "--stride", stride, "--min-tissue", least]
    table, embeddings = rows_of(embed(teacher, slide, tmp_path / "out", *options))
    places, level = grid(slide, mpp, 56, stride, least)
    assert len(places) > 20
    assert list(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True)) == places
    assert set(table["slide"].to_pylist()) == {"demo_train"} and set(table["tile_size"].to_pylist()) == {56}
    if mpp in (0.25, 0.5):
        scale = round(mpp / 0.25)
        tiles = [level[y // scale :, x // scale :][:56, :56] for x, y in places]
        np.testing.assert_allclose(embeddings, expected(teacher, tiles), atol=1e-5)
    about = json.loads(pq.read_metadata(tmp_path / "out/demo_train.parquet").metadata[b"part"])
    assert about["slide_mpp"] == 0.25 and about["tile_size_level0"] == round(56 * mpp / 0.25)


def test_folders_and_lists_of_slides(teacher, slides, tmp_path):
    coarse = ["--mpp", 1, "--tile-size", 56]
    folder = embed(teacher, slides, tmp_path / "folder", *coarse)
    assert sorted(path.name for path in folder.glob("*.parquet")) == [
        "demo_holdout.parquet",
        "demo_train.parquet",
    ]
    (tmp_path / "list.txt").write_text(f"# two\n{slides}/demo_holdout.svs\n")
    (tmp_path / "list.csv").write_text(f"path,mpp\n{slides}/demo_holdout.svs,0.25\n")
    one = pq.read_table(folder / "demo_holdout.parquet")
    for name in ("list.txt", "list.csv"):
        listed = embed(teacher, tmp_path / name, tmp_path / f"{name}.out", *coarse)
        assert pq.read_table(listed / "demo_holdout.parquet").equals(one)


def test_slides_of_one_name_and_without_tissue(teacher, slides, tmp_path, capsys):
    for place, slide in (("a", "demo_holdout"), ("b", "demo_train")):
        (tmp_path / "in" / place).mkdir(parents=True)
        os.link(slides / f"{slide}.svs", tmp_path / "in" / place / "s.svs")
    output = embed(teacher, tmp_path / "in", tmp_path / "out", "--mpp", 1, "--tile-size", 56)
    names = sorted(path.stem for path in output.glob("*.parquet"))
    assert len(names) == 2 and all(name.startswith("s.") for name in names)
    assert set(rows_of(output)[0]["slide"].to_pylist()) == set(names)
    nothing = embed(teacher, tmp_path / "in", tmp_path / "none", "--tile-size", 56, "--min-tissue", 1, "--mpp", 3)
    table = pq.read_table(nothing)
    assert len(table) == 0 and "embedding" in table.column_names
    assert "no tile with enough tissue" in capsys.readouterr().err
    embed(teacher, tmp_path / "in", nothing, "--tile-size", 56, "--min-tissue", 1, "--mpp", 3)


def test_hdf5(teacher, slides, tmp_path):
    options = ["--mpp", 0.5, "--tile-size", 56, "--stride", 112]
    slide = slides / "demo_train.svs"
    output = embed(teacher, slide, tmp_path / "out", "--format", "hdf5", *options)
    table, embeddings = rows_of(embed(teacher, slide, tmp_path / "parquet", *options))
    with h5py.File(output / "demo_train.h5") as file:
        features, coords = file["features"][:], file["coords"][:]
        np.testing.assert_array_equal(features, embeddings)
        assert features.dtype == np.float32 and coords.dtype == np.int64
        places = zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True)
        assert list(map(tuple, coords.tolist())) == list(places)
        wanted = {
            "patch_size": 56,
            "patch_size_level0": 112,
            "level0_magnification": 40,
            "target_magnification": 20,
        }
        assert wanted.items() <= dict(file["coords"].attrs).items()
        assert json.loads(file["run"][()])["mean"] == list(MEAN)


def plain_slide(path, description):
    """A pink slide of one level with a description."""
    text = f"Aperio Image Library v12.0.15 \r\n512x512 [0,0 512x512] (256x256) {description}"
    pink = np.full((512, 512, 3), (225, 150, 190), np.uint8)
    tifffile.imwrite(path, pink, tile=(256, 256), description=text, metadata=None, software=None,
                     photometric="rgb", compression="jpeg")  # fmt: skip


def test_slides_that_cannot_be_cut(teacher, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    plain_slide(tmp_path / "in/silent.svs", "")
    said = refused(teacher, capsys, tmp_path / "in", tmp_path / "out")
    assert "silent.svs' does not say its resolution" in said and "--mpp-file" in said
    plain_slide(tmp_path / "in/coarse.svs", "|MPP = 2")
    (tmp_path / "in/broken.svs").write_bytes(b"no slide")
    (tmp_path / "mpp.csv").write_text("slide,mpp\nsilent,0.5\n")
    table = ["--mpp-file", tmp_path / "mpp.csv"]
    assert "broken.svs" in refused(teacher, capsys, tmp_path / "in", tmp_path / "two", *table)
    output = embed(teacher, tmp_path / "in", tmp_path / "two", "--skip-damaged", *table)
    assert "2 parts could not be read: Slide" in capsys.readouterr().err
    assert len(contents(output)) == 1
    assert list(zip(*(rows_of(output)[0][key].to_pylist() for key in "xy"), strict=True)) == [
        (x, y) for y in (0, 224) for x in (0, 224)
    ]


def test_bad_input(teacher, slides, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((56, 56, 3), np.uint8))
    (tmp_path / "a.zip").write_bytes(b"PK")
    out = tmp_path / "out"

    def say(source, *options):
        return refused(teacher, capsys, source, out, *options)

    assert f"Input '{tmp_path}/nothing' does not exist" in say(tmp_path / "nothing")
    assert "holds no image, Parquet shard or slide" in say(tmp_path / "empty")
    assert "dinov2.data.pack makes shards" in say(tmp_path / "a.zip")
    assert "may be images or slides by its endings; say which with --kind" in say(tmp_path / "a.tif")
    assert "--tile-size is 60, but the network takes multiples of its patch size 14" in say(slides, "--tile-size", 60)
    assert "--image-size is 30, but it must be a positive multiple" in say(slides, "--resize", 30)
    assert "--min-tissue is 2" in say(slides, "--min-tissue", 2)
    assert "There is no mpp table" in say(slides, "--mpp-file", tmp_path / "none.csv")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    assert "hold no backbone" in refused((tmp_path / "other.pth",), capsys, slides, out)
    assert "does not exist" in refused((tmp_path / "none.pth",), capsys, slides, out)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "PyTorch sees no GPUs; --device cpu" in say(slides, "--device", "cuda")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "needs h5py, which is not installed" in say(slides, "--format", "hdf5")
    assert not out.exists()


@pytest.mark.data
@pytest.mark.parametrize(("name", "given"), [("cmu-1-small-region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 0.25)])
def test_real_slides(teacher, name, given, tmp_path):
    openslide = pytest.importorskip("openslide")
    slide = real_slide(name)
    options = ["--tile-size", 56, "--stride", 224]
    if given is not None:
        (tmp_path / "mpp.csv").write_text(f"slide,mpp\n{name},{given}\n")
        options += ["--mpp-file", tmp_path / "mpp.csv", "--mpp", given]
    table, embeddings = rows_of(embed(teacher, slide, tmp_path / "out", *options))
    places = list(zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True))
    assert len(places) > 20
    with openslide.OpenSlide(slide) as opened:
        tiles = [np.asarray(opened.read_region(place, 0, (56, 56)).convert("RGB")) for place in places]
    np.testing.assert_allclose(embeddings, expected(teacher, tiles), atol=2e-5)
