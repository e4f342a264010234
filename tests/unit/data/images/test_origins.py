"""Slides, patients and sites of tiles: from names, patterns, tables and lists."""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.build.data import open_data, recognise
from dinov2.configs import ConfigError, load_config, validate
from dinov2.data.images.list import open_image_list
from dinov2.data.inspect.__main__ import main as inspect
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
    "old line ends": b"file,label\rin/1.png,0\rin/2.png,1\r",
    "semicolons": "file;label\nin/1.png;0\nin/2.png;ä, b\n".encode(),
    "tabs": b"file\tlabel\nin/1.png\t0\nin/2.png\t1\n",
    "UTF-16": "file,label\nin/1.png,0\nin/2.png,1\n".encode("utf-16"),
    "comment": b"# of our scanner\n\nfile\nin/1.png\n\nin/2.png\n",
    "no header": b"in/1.png,0\nin/2.png,1\n",
    "Windows": b"file\nin\\1.png\nin\\2.png\n",
    "other forms": b"file\nin/../in/1.png\nin//2.png\n.//in/./1.png\n",
    "training": b"file,Split\nin/1.png,Training\nin/3.png,Test\nin/2.png,TRAIN\n",
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
    if name not in ("Windows", "other forms"):
        assert [file.name for file in open_image_list("lists/list.csv")[1]] == ["in/1.png", "in/2.png"]


def test_a_file_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "set", "in/1.png", "in/2.png")
    folder(tmp_path / "home", "out/3.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = [f"{tmp_path}/set/in/1.png", "in/1.png", f"file://{tmp_path}/set/in/2.png", "~/out/3.png"]
    path = tmp_path / "set/list.txt"
    path.write_text("\n".join(names))
    assert recognise(str(path)) == "image_list"
    source = opened(path)
    assert [origin.slide for origin in origins(source)] == [f"{tmp_path}/home/out", "in", "in"]


def test_lists_of_urls(tmp_path: Path) -> None:
    folder(tmp_path / "set", "a/1.png", "b/2.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "set"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        path = tmp_path / "list.csv"
        path.write_text(f"file,patient\n{url}/a/1.png,p\n{url}/b/2.png,q\n")
        source = opened(path)
        assert source.is_remote and [data for _, data in source.read(0, [0, 1])] == [PNG, PNG]
        assert origins(source) == [("a", "p", ""), ("b", "q", "")]
        path.write_text(f"file\n{url}/a/1.png\na/1.png\n")
        with pytest.raises(ValueError, match="http://127"):
            opened(path)
        path.write_text(f"file\n{url}/a/1.png\n{url}/c.png\n")
        with pytest.raises(FileNotFoundError, match=r"/c.png"):
            opened(path)
        server.shutdown()


def test_tables_that_contradict_themselves(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", "a/1.png", "b/1.png", "b/2.png")
    for text, words in (
        ("file,patient\n2.png,p\n2.png,q\n", "'2.png' twice"),
        ("slide,patient\na,p\na,q\n", "'a' twice"),
        ("file,patient\n1.png,p\n", r"a/1.png' and 'b/1.png"),
        ("file,patient,patient\n2.png,p,q\n", "two columns 'patient'"),
    ):
        (tmp_path / "groups.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            opened(path, f"data.groups_file={tmp_path}/groups.csv")
    (path / "list.csv").write_text("file,patient\na/1.png,p\n./a/1.png,q\n")
    with pytest.raises(ValueError, match=r"'a/1.png' twice"):
        opened(path / "list.csv")
    (path / "list.csv").write_text("file,split\na/1.png,val\nb/1.png,test\n")
    with pytest.raises(ValueError, match="test, val"):
        opened(path / "list.csv")


def test_tables_may_name_tiles_by_paths_and_columns_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "set", "a/1.png", "b/2.png")
    table = tmp_path / "groups.csv"
    table.write_text(f"file,case_id,slide_id\n{path}/a/1.png,p,s\nset/b/2.png,q,t\n")
    assert origins(opened(path, f"data.groups_file={table}")) == [("s", "p", ""), ("t", "q", "")]
    table.write_text("slide,patient\nc,p\n")
    with caplog.at_level(logging.WARNING):
        opened(path, f"data.groups_file={table}")
    assert "'c'" in caplog.text


def test_patients_of_shards_are_not_told_by_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PNG]}), tmp_path / "a.parquet")
    (tmp_path / "groups.csv").write_text("slide,patient\na,p\n")
    for key in (f"groups_file={tmp_path}/groups.csv", "patient_pattern='(?P<patient>.)'"):
        with pytest.raises(ValueError, match=key.partition("=")[0]):
            opened(tmp_path / "a.parquet", f"data.{key}")
    assert inspect([str(folder(tmp_path / "set", "a/1.png")), "--patient-pattern", "["]) == 2


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


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_splits_inside_archives_are_said(write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / f"a.{write.__name__[6:]}", {"train/1.png": PNG, "Test/a/1.png": PNG})
    assert opened(path).num_rows == 2
    assert "folders test inside" in caplog.text
    caplog.clear()
    write(path, {"train/test_1.png": PNG, "intestine/1.png": PNG})
    opened(path)
    assert not caplog.text
