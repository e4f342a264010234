"""The command line: from a manifest or a filter to a folder."""

import errno
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from prepatching_scripts import download_tcga
from prepatching_scripts.download_tcga import main
from tests.helpers.gdc_server import Fault, Stored
from tests.unit.prepatching_scripts.gdc.conftest import (
    CONTENT,
    HALF,
    HEADER,
    add_collection,
    failures,
    write_manifest,
)


def test_manifest_to_folder_in_parallel_and_again(server, cli, tmp_path: Path):
    stored = [server.add(f"{i}.svs", CONTENT[i:]) for i in range(6)]
    manifest = write_manifest(tmp_path / "m.txt", stored)
    server.meeting = threading.Barrier(3)  # passes only if three requests are there at once
    assert cli("--manifest", str(manifest), "--workers", "3") == 0
    assert server.at_once == 3
    for i, file in enumerate(stored):
        assert (tmp_path / "out" / file.id / f"{i}.svs").read_bytes() == CONTENT[i:]
    assert failures(tmp_path) == []
    before = server.requests.copy()
    assert cli("--manifest", str(manifest)) == 0
    assert cli("--manifest", str(manifest), "--verify") == 0
    assert server.requests == before


def test_filter_to_folder_and_again(server, cli, tmp_path: Path, caplog):
    wanted = add_collection(server)
    options = ["--filter", "--flat", "--project", "TCGA-LUAD"]
    assert cli(*options) == 0
    luad = {name: name.encode() * 100 for name in wanted if "LUAD" in name}
    out = tmp_path / "out"
    assert {path.name: path.read_bytes() for path in out.glob("*.svs")} == luad
    lines = (out / "gdc_manifest.txt").read_text().splitlines(keepends=True)
    assert lines == [
        HEADER,
        *(wanted[name].line() for name in sorted(luad, key=lambda name: wanted[name].id)),
    ]
    meta = json.loads((out / "gdc_manifest.txt.meta.json").read_text())
    assert (meta["num_files"], meta["num_bytes"]) == (4, sum(map(len, luad.values())))
    before = server.requests.copy()
    server.add("TCGA-LUAD-new.svs", b"7")  # the list stays as it was found
    assert cli(*options) == 0
    assert server.requests == before
    assert cli("--filter") == 2
    assert "was not made by this filter" in caplog.text
    assert main(["--output", str(tmp_path / "b"), "--endpoint", server.url, "--filter", "--project", "X"]) == 2
    assert "has no file for" in caplog.text


def test_failures_are_listed_and_good_files_come(server, cli, tmp_path: Path, caplog):
    stored = [server.add(f"{name}.svs", name.encode() * 999) for name in ("good", "gone", "bad", "busy")]
    _, gone, bad, busy = stored
    del server.contents[gone.id]
    server.always[bad.id] = Fault("wrong")
    server.always[busy.id] = Fault("503")
    assert cli("--manifest", str(write_manifest(tmp_path / "m.txt", stored))) == 1
    reasons = {row["id"]: row["reason"] for row in failures(tmp_path)}
    assert reasons.keys() == {gone.id, bad.id, busy.id}
    assert "HTTP 404" in reasons[gone.id]
    assert "md5" in reasons[bad.id]
    assert "HTTP 503" in reasons[busy.id]
    assert "3 of 4 files failed" in caplog.text
    assert [path.name for path in (tmp_path / "out").rglob("*")].count("good.svs") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [stored[0].id, "failures.jsonl"]
    server.always.clear()
    server.contents[gone.id] = b"gone" * 999
    assert cli("--manifest", str(tmp_path / "m.txt")) == 0
    assert failures(tmp_path) == []


def test_flat_names_must_differ(server, cli, tmp_path: Path, caplog):
    first = server.add("a.svs", b"1")
    second = Stored(other := "00000000-0000-0000-0000-000000000001", "A.SVS", first.md5, 1)
    third = server.add("failures.jsonl", b"2")
    assert cli("--flat", "--manifest", str(write_manifest(tmp_path / "m.txt", [first, second]))) == 2
    assert f"'A.SVS' is the name of {other} and of {first.id}" in caplog.text
    assert cli("--flat", "--manifest", str(write_manifest(tmp_path / "m.txt", [third]))) == 2
    assert "and of this tool" in caplog.text
    assert not server.requests


def test_token_is_sent_and_not_told(server, slide, cli, tmp_path: Path, caplog, capfd):
    caplog.set_level(logging.INFO)
    server.controlled = {slide.id}
    manifest, token = str(write_manifest(tmp_path / "m.txt", [slide])), tmp_path / "token"
    token.write_text("hush-hush\n")
    assert cli("--manifest", manifest, "--token-file", str(token)) == 1
    assert server.tokens_seen == {"hush-hush"}
    assert "HTTP 403" in failures(tmp_path)[0]["reason"]
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "hush-hush" not in caplog.text + "".join(capfd.readouterr()) + written
    token.write_text("granted")
    assert cli("--manifest", manifest, "--token-file", str(token)) == 0
    for content in ("", "two\nlines"):
        token.write_text(content)
        assert cli("--manifest", manifest, "--token-file", str(token)) == 2
    assert caplog.text.count("holds no token") == 2


def test_a_full_disk_ends_it(server, cli, tmp_path: Path, caplog):
    stored = [server.add(f"{i}.svs", CONTENT) for i in range(9)]
    (tmp_path / "out" / stored[0].id).mkdir(parents=True)
    (tmp_path / "out" / stored[0].id / "0.svs.part").symlink_to("/dev/full")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as refused:
        full.write(b"x")
    assert refused.value.errno == errno.ENOSPC
    assert cli("--workers", "1", "--manifest", str(write_manifest(tmp_path / "m.txt", stored))) == 2
    assert "is full, 0 of 9 files are whole; make room and run the same command again" in caplog.text
    assert server.requests.total() <= 2


def test_space_is_compared_with_what_is_missing(server, slide, cli, tmp_path: Path, caplog, monkeypatch):
    manifest = str(write_manifest(tmp_path / "m.txt", [slide]))
    monkeypatch.setattr(download_tcga.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_001))
    assert cli("--manifest", manifest) == 2
    assert "0.000 GB free, but 0.000 GB are missing" in caplog.text
    assert not server.requests
    (tmp_path / "out" / slide.id).mkdir()
    (tmp_path / "out" / slide.id / f"{slide.name}.part").write_bytes(CONTENT[:HALF])
    assert cli("--manifest", manifest) == 0  # the half fits
    monkeypatch.setattr(download_tcga.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert cli("--manifest", manifest) == 0  # nothing is missing
    (tmp_path / "out" / slide.id / slide.name).write_bytes(b"other")
    assert cli("--manifest", manifest, "--redownload") == 2  # so all of it is
    assert cli("--manifest", manifest, "--redownload", "--ignore-space") == 0
    assert "will end when the disk is full" in caplog.text


@pytest.mark.parametrize(
    "argv", [[], ["--manifest", "m", "--filter"], ["--manifest", "m", "--workers", "0"],
             ["--manifest", "m", "--limit-mbps", "0"], ["--manifest", "m", "--project", "TCGA-BRCA"]]
)  # fmt: skip
def test_options_that_make_no_sense(cli, argv: list[str]):
    with pytest.raises(SystemExit) as ended:
        cli(*argv)
    assert ended.value.code == 2


def test_bad_arguments_end_in_one_sentence(cli, tmp_path: Path, caplog):
    assert cli("--manifest", str(tmp_path / "none.txt")) == 2
    assert "none.txt" in caplog.text
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    assert cli("--filter") == 2
