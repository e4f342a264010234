"""Tiles and labels are found in every layout, and what does not match is named."""

import logging

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinov2.eval.datasets.images import ParquetTiles, UnreadableImage
from dinov2.eval.datasets.labels import open_labelled_tiles


def write(path, level, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)


def levels(tiles):
    return [int(tiles.images.read(index)[0, 0, 0]) for index in range(len(tiles.images))]


@pytest.fixture
def classes(tmp_path):
    for number, name in enumerate(["tumour/a.png", "tumour/deep/b.tif", "normal/c.bmp", "normal/d.png"]):
        write(tmp_path / "tiles" / name, 10 * number)
    write(tmp_path / "tiles" / ".ipynb_checkpoints" / "e.png", 0)
    (tmp_path / "tiles" / "normal" / "notes.txt").write_text("no image")
    return tmp_path / "tiles"


def csv_file(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return path


def test_class_folders(classes):
    tiles = open_labelled_tiles(classes)
    assert tiles.classes == ("normal", "tumour")
    assert tiles.labels.tolist() == [0, 0, 1, 1]
    assert levels(tiles) == [20, 30, 0, 10]
    assert tiles.splits is None and tiles.groups().tolist() == [0, 1, 2, 3]


def test_folders_of_splits(tmp_path):
    for part in ("train", "valid", "test"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "1.png", 0)
    tiles = open_labelled_tiles(tmp_path)
    assert tiles.classes == ("a", "b")
    assert tiles.splits == ("test", "test", "train", "train", "val", "val")


def test_csv_of_tiles(classes, tmp_path):
    rows = ["file,label,slide,patient,split", "tumour/a.png,x,s1,p1,train", "tumour/deep/b.tif,y,s1,p1,train"]
    rows += ["normal/c.bmp,x,s2,p1,val", "normal/d.png,y,s3,p2,test"]
    tiles = open_labelled_tiles(classes, csv_file(tmp_path, "\n".join(rows)))
    assert (tiles.classes, tiles.labels.tolist(), levels(tiles)) == (
        ("x", "y"),
        [0, 1, 0, 1],
        [0, 10, 20, 30],
    )
    assert tiles.slides == ("s1", "s1", "s2", "s3") and tiles.splits == ("train", "train", "val", "test")
    assert tiles.groups().tolist() == [0, 0, 0, 1] and tiles.groups("slide").tolist() == [0, 0, 1, 2]
    assert not tiles.per_slide


@pytest.mark.parametrize("pattern", [None, r"(TCGA-[^/]*)/"])
def test_csv_of_slides(tmp_path, pattern, caplog):
    slides = ["TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "TCGA-AA-0002-01Z-00-DX1"]
    for number, slide in enumerate(slides):
        write(tmp_path / "tiles" / slide / "0_0.png", number)
    text = "\n".join(["slide_id,label", *(f"{s},{name}" for s, name in zip(slides, "aab", strict=True)), "gone,a"])
    with caplog.at_level(logging.WARNING):
        tiles = open_labelled_tiles(tmp_path / "tiles", csv_file(tmp_path, text), pattern)
    assert tiles.per_slide and tiles.slides == tuple(slides) and tiles.labels.tolist() == [0, 0, 1]
    assert tiles.patients == ("TCGA-AA-0001", "TCGA-AA-0001", "TCGA-AA-0002")


def shard(path, count, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [cv2.imencode(".png", np.full((14, 14, 3), 10 * i, np.uint8))[1].tobytes() for i in range(count)]
    table = pa.table({"slide_path": [f"/x/s{i % 2}.svs" for i in range(count)], "image_bytes": data, **columns})
    pq.write_table(table, path, row_group_size=4)


def test_shards_with_a_label_column(tmp_path):
    shard(tmp_path / "a.parquet", 6, label=[0, 1, 0, 1, 0, 1], split=["train"] * 6)
    shard(tmp_path / "b" / "b.parquet", 3, label=[1, 1, 0], split=["test"] * 3)
    tiles = open_labelled_tiles(tmp_path)
    assert tiles.classes == ("0", "1") and tiles.labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 0]
    assert levels(tiles) == [0, 10, 20, 30, 40, 50, 0, 10, 20]
    assert tiles.splits == ("train",) * 6 + ("test",) * 3
    assert tiles.groups("slide").tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_a_column_of_patients_makes_the_folds_and_nulls_go_by_the_slide(tmp_path):
    patients = ["p", "p", "q", None, "q", None]
    shard(tmp_path / "a.parquet", 6, label=[0, 1, 0, 1, 0, 1], patient=patients)
    shard(tmp_path / "b.parquet", 2, label=[0, 1])
    tiles = open_labelled_tiles(tmp_path)
    assert tiles.patients == ("p", "p", "q", "s1", "q", "s1", "s0", "s1")
    assert tiles.groups().tolist() == [0, 0, 1, 3, 1, 3, 2, 3]
    labels = csv_file(tmp_path, "slide_id,label\ns0,x\ns1,y\n")
    assert open_labelled_tiles(tmp_path, labels).patients == tiles.patients
    labels = csv_file(tmp_path, "slide_id,label,patient\ns0,x,one\ns1,y,two\n")
    assert open_labelled_tiles(tmp_path, labels).patients == ("one", "two") * 4


def test_one_shard_by_its_name(tmp_path):
    shard(tmp_path / "a.parquet", 6, label=[0, 1, 0, 1, 0, 1])
    shard(tmp_path / "b.parquet", 2, label=[0, 1])
    assert levels(open_labelled_tiles(tmp_path / "a.parquet")) == [0, 10, 20, 30, 40, 50]
    (tmp_path / "notes.txt").touch()
    with pytest.raises(NotADirectoryError):
        open_labelled_tiles(tmp_path / "notes.txt")


def test_a_column_with_one_split_divides_nothing(tmp_path):
    shard(tmp_path / "a.parquet", 4, label=[0, 1, 0, 1], split=["train"] * 4)
    assert open_labelled_tiles(tmp_path).splits is None


def test_shards_with_a_csv_of_slides(tmp_path):
    shard(tmp_path / "shards" / "a.parquet", 6)
    tiles = open_labelled_tiles(tmp_path / "shards", csv_file(tmp_path, "slide_id,label,patient\ns0,x,p\ns1,y,q\n"))
    assert tiles.labels.tolist() == [0, 1, 0, 1, 0, 1] and tiles.patients == tuple("pqpqpq")


def shard_of(path, slides, **columns):
    """One grey tile of each slide."""
    data = [cv2.imencode(".png", np.full((2, 2, 3), n, np.uint8))[1].tobytes() for n in range(len(slides))]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"slide_path": list(slides), "image_bytes": pa.array(data, pa.binary()), **columns}
    pq.write_table(pa.table(table), path)


SCANS = [f"slides/TCGA-AA-{patient:04}/scan_{scan}.svs" for patient in (1, 2, 3, 4) for scan in (1, 2)]


@pytest.mark.parametrize("layout", ["label column", "slides by path", "slides by name", "folders"])
def test_folds_keep_patients_whole_as_the_training_split_does(layout, tmp_path):
    """Folders, not file names, tell the patients."""
    root, csv = tmp_path / "tiles", None
    classes = [number // 2 % 2 for number in range(8)]
    if layout == "label column":
        shard_of(root / "a.parquet", SCANS, label=classes)
    elif layout == "slides by path":
        shard_of(root / "a.parquet", SCANS)
        csv = "\n".join(["slide_id,label", *(f"{s},{c}" for s, c in zip(SCANS, classes, strict=True))])
    else:
        scans = [f"{slide.removesuffix('.svs')}_{n}" for n, slide in enumerate(SCANS)]  # one name, one slide
        if layout == "folders":
            for number, slide in enumerate(scans):
                write(root / slide / "tile.png", number)
        else:
            shard_of(root / "a.parquet", [f"{slide}.svs" for slide in scans])
        names = [slide.rpartition("/")[2] for slide in scans]
        csv = "\n".join(["slide_id,label", *(f"{s},{c}" for s, c in zip(names, classes, strict=True))])
    tiles = open_labelled_tiles(root, csv and csv_file(tmp_path, csv))
    assert tiles.groups().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tiles.groups("patient").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_slides_of_one_name_are_one_patient_as_in_the_training_split(tmp_path):
    shard_of(tmp_path / "a.parquet", ["x/1.svs", "y/1.svs", "x/2.svs", "y/3.svs"], label=[0, 0, 1, 1])
    assert open_labelled_tiles(tmp_path).groups().tolist() == [0, 0, 1, 2]
    shard_of(tmp_path / "a.parquet", ["x/1.svs", "y/4.svs", "x/2.svs", "y/3.svs"], label=[0, 0, 1, 1])
    assert open_labelled_tiles(tmp_path).patients is None


def test_some_rows_of_shards(tmp_path):
    from dinov2.data.parquet.source import ParquetSource

    shard(tmp_path / "a.parquet", 10)
    tiles = ParquetTiles([ParquetSource(str(tmp_path))], limit=3)
    assert [int(tiles.read(i)[0, 0, 0]) for i in range(len(tiles))] == [0, 30, 60]
    assert [origin.slide for origin in tiles.origins()] == ["/x/s0.svs", "/x/s1.svs", "/x/s0.svs"]


def test_thinning_keeps_fractions_and_order(tmp_path):
    for name, count in (("a", 30), ("b", 10)):
        for number in range(count):
            write(tmp_path / name / f"{number:02}.png", number + 100 * (name == "b"), (2, 2))
    tiles = open_labelled_tiles(tmp_path)
    thin = tiles.thinned(20, seed=1)
    assert np.bincount(thin.labels).tolist() == [15, 5]
    assert levels(thin) == sorted(set(levels(thin))) and len(thin.images) == 20
    assert [level >= 100 for level in levels(thin)] == thin.labels.astype(bool).tolist()
    assert levels(tiles.thinned(20, seed=1)) == levels(thin) != levels(tiles.thinned(20, seed=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\ntumour/a.png,x\nnone.png,y\n", r"name 'none.png', which is not in"),
        ("file,label\ntumour/a.png,x\nnormal/c.bmp,y\n", r"Tile 'normal/d.png' \(and 1 more\) of .* has no label"),
        ("file,label\ntumour/a.png,x\ntumour/a.png,y\n", r"line 3: 'tumour/a.png' is there twice"),
        ("file,label\ntumour/a.png,\n", r"line 2: file or label is empty"),
        ("name,label\na,x\n", r"have columns name, label; file,label or slide_id,label are expected"),
        ("slide_id,label\ntumour,x\ndeep,y\n", r"Slide 'normal', which has tiles, is not in"),
        ("slide_id,label\ntumour,x\ndeep,x\nnormal,x\n", r"Labels name 1 class \(x\); at least 2 are needed"),
        ("slide_id,label,split\ntumour,x,train\ndeep,y,dev\nnormal,x,test\n", r"Split 'dev' is none of train, val"),
        ("slide_id,label,split\ntumour,x,train\ndeep,y,train\nnormal,x,val\n", r"Splits hold no test tiles"),
        ("slide_id,label,patient\ntumour,x,p\ndeep,y,\nnormal,x,p\n", r"Column 'patient' is empty for .*b.tif"),
    ],
)  # fmt: skip
def test_labels_that_do_not_match(classes, tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        open_labelled_tiles(classes, csv_file(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "Validation", "test"])
def test_a_split_that_is_the_same_everywhere_divides_nothing(classes, tmp_path, split):
    text = "slide_id,label,split\ntumour,x,{0}\ndeep,y,{0}\nnormal,x,{0}\n"
    assert open_labelled_tiles(classes, csv_file(tmp_path, text.format(split))).splits is None
    with pytest.raises(ValueError, match="Split 'dev'"):
        open_labelled_tiles(classes, csv_file(tmp_path, text.format("dev")))


def test_empty_class_folder(classes):
    (classes / "stroma").mkdir()
    with pytest.raises(ValueError, match=r"Class folder '.*stroma' holds no image"):
        open_labelled_tiles(classes)


def test_what_is_not_there(classes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Folder '.*none' of labelled tiles does not exist"):
        open_labelled_tiles(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"Labels '.*none.csv' do not exist"):
        open_labelled_tiles(classes, tmp_path / "none.csv")
    with pytest.raises(ValueError, match="has no subfolders"):
        open_labelled_tiles(classes / "tumour" / "deep")
    shard(tmp_path / "shards" / "a.parquet", 3)
    with pytest.raises(ValueError, match="have no column 'label'"):
        open_labelled_tiles(tmp_path / "shards")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), ("a", "has 0 groups; 1 is needed"), ("(z+)", "does not match tile")],
)
def test_slide_patterns(classes, tmp_path, pattern, message):
    with pytest.raises(ValueError, match=message):
        open_labelled_tiles(classes, csv_file(tmp_path, "slide_id,label\na,x\nb,y\n"), pattern)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nrest"])
def test_unreadable_image(classes, content):
    (classes / "normal" / "d.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"Image '.*d.png' cannot be read: "):
        open_labelled_tiles(classes).images.read(1)
