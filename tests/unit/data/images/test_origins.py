"""Slides, patients and sites of tiles: from names, patterns, tables and lists."""

import logging
import os
from pathlib import Path

import pytest

from dinov2.build.data import open_data, recognise
from dinov2.configs import ConfigError, load_config, validate
from dinov2.data.images.list import open_image_list
from dinov2.data.source import Origin, Source, origins_of
from tests.helpers.collections import write_folder, write_tar, write_zip
from tests.helpers.shards import encode, tile

PNG = encode(tile(0), "png")


def opened(path: Path, *overrides: str) -> Source:
    return open_data(load_config(None, [f"data.path={path}", *overrides])).source


def origins(source: Source) -> list[Origin]:
    return [origin for group in range(len(source.group_rows)) for origin in origins_of(source, group)]


def folder(path: Path, *names: str) -> Path:
    return write_folder(path, dict.fromkeys(names, PNG))


def test_names_tell_slides(tmp_path: Path) -> None:
    names = {
        "tumor/TCGA-AA-0001-01Z-00-DX1.uuid_1_2.png": "TCGA-AA-0001-01Z-00-DX1",
        "tumor/TCGA-AA-0002_7.png": "TCGA-AA-0002",
        "slide 7/1_2.png": "slide 7",
        "a/b/1.png": "a/b",
        "root.png": "",
    }
    found = origins(opened(folder(tmp_path / "set", *names)))
    assert [origin.slide for origin in found] == [names[name] for name in sorted(names)]
    write_tar(tmp_path / "shard.tar", dict.fromkeys(names, PNG))
    assert [o.slide for o in origins(opened(tmp_path / "shard.tar"))] == [slide or "shard" for slide in names.values()]
    write_zip(tmp_path / "x.zip", {"1.png": PNG})
    assert origins(opened(tmp_path / "x.zip")) == [("x", "", "")]


def test_a_pattern_tells_what_it_finds(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", "oslo/P1_S1_7.png", "rome/P2_S3_8.png", "rome/none.png")
    source = opened(path, r"data.patient_pattern='(?P<site>\w+)/(?P<patient>P\d)_(?P<slide>S\d)'")
    assert origins(source) == [("S1", "P1", "oslo"), ("S3", "P2", "rome"), ("rome", "", "")]
    with pytest.raises(ValueError, match=r"oslo/P1_S1_7\.png"):
        opened(path, "data.patient_pattern='(?P<patient>Q.)'")
    for wrong in ("(P.)", "(?P<patient>", "(?P<case>.)"):
        with pytest.raises(ConfigError, match=r"data.patient_pattern"):
            validate(load_config(None, [f"data.path={path}", f"data.patient_pattern='{wrong}'"]), 1)


def test_a_table_tells_of_tiles_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "set", "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    table = tmp_path / "groups.csv"
    table.write_bytes(b'\xef\xbb\xbfFile,patient,slide\r\n"a/1.png",p1,"s, 1"\r\n./a/2.png,p2,\r\n3.png,p3,s3\r\n')
    with caplog.at_level(logging.WARNING):
        found = origins(opened(path, f"data.groups_file={table}"))
    assert found == [("s, 1", "p1", ""), ("a", "p2", ""), ("s3", "p3", ""), ("b", "", "")]
    assert "1 of 4" in caplog.text
    write_tar(tmp_path / "x.tar", dict.fromkeys(["a/1.png", "a/9.png"], PNG))
    assert origins(opened(tmp_path / "x.tar", f"data.groups_file={table}"))[0] == ("s, 1", "p1", "")
    table.write_text("file,patient\nz.png,p\n")
    with pytest.raises(ValueError, match=r"z.png|a/1.png"):
        opened(path, f"data.groups_file={table}")
    table.write_text("name,case\nz.png,p\n")
    with pytest.raises(ValueError, match="name, case"):
        opened(path, f"data.groups_file={table}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        opened(path, "data.groups_file=nowhere.csv")


def test_a_table_tells_of_slides(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", "x/a/1.png", "b/3.png", "b/4.png", "c/5.png")
    (tmp_path / "groups.csv").write_text("slide,patient,site\na,p1,s1\nb,p2,\n")
    found = origins(opened(path, f"data.groups_file={tmp_path}/groups.csv"))
    assert found == [("b", "p2", ""), ("b", "p2", ""), ("c", "", ""), ("x/a", "p1", "s1")]


def test_validation_needs_to_know_patients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "flat", *(f"{number}.png" for number in range(9)))
    with pytest.raises(ValueError, match=r"data.groups_file"):
        opened(path, "data.validation_fraction=0.5")
    with caplog.at_level(logging.WARNING):
        opened(folder(tmp_path / "classes", "a/1.png", "b/2.png", "c/3.png"), "data.validation_fraction=0.3")
    assert "folder" in caplog.text


LISTS = {
    "plain": b"file\nin/1.png\nin/2.png\n",
    "marked": b"\xef\xbb\xbffile,label\r\nin/1.png,0\r\nin/2.png,1\r\n",
    "quoted": b'label,"image"\n"a, b","in/1.png"\n"c\nd","./in/2.png"\n',
    "twice": b"path\nin/2.png\nin/1.png\nin/2.png\n\n",
    "split": b"filename,split\nin/1.png,train\nin/3.png,test\nin/2.png,train\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_images(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, "in/1.png", "in/2.png", "in/3.png")
    (tmp_path / "list.csv").write_bytes(LISTS[name])
    assert recognise(str(tmp_path / "list.csv")) == "image_list"
    _, files, _ = open_image_list(str(tmp_path / "list.csv"))
    assert [file.name for file in files] == ["in/1.png", "in/2.png"] and files[0].size == len(PNG)
    monkeypatch.chdir(tmp_path)
    os.makedirs("lists")
    (tmp_path / "lists/list.csv").write_bytes(LISTS[name])
    assert [file.name for file in open_image_list("lists/list.csv")[1]] == ["in/1.png", "in/2.png"]


def test_lists_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder(tmp_path, "in/1.png")
    path = tmp_path / "list.csv"
    for text, error, words in (
        ("file\nin/1.png\nin/2.png\n", FileNotFoundError, r"1 of 2 .*in/2.png"),
        ("name,label\nin/1.png,1\n", ValueError, "name, label"),
        ("file\n", ValueError, "no image"),
        ("file\na\n1,2\n", ValueError, "list.csv"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=words):
            opened(path, "data.kind=image_list")
    path.write_text("name,label\nin/1.png,1\n")
    assert opened(path, "data.kind=image_list", "data.image_column=Name").num_rows == 1
