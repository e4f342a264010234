"""One file from a server that breaks: resumed, verified, and never taken for whole too early."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from prepatching_scripts.gdc import download as gdc_download
from prepatching_scripts.gdc.query import Gdc
from tests.helpers.gdc_server import Fault, GdcServer, Stored
from tests.unit.prepatching_scripts.gdc.conftest import CONTENT, HALF, size_of

RANGE_FROM_HALF = ["", f"bytes={HALF}-"]


@pytest.mark.parametrize(
    ("fault", "ranges"),
    [
        (Fault("503"), ["", ""]),
        (Fault("429", (("Retry-After", "1"),)), ["", ""]),
        (Fault("drop"), ["", ""]),
        (Fault("hang"), ["", ""]),
        (Fault("html"), ["", ""]),
        (Fault("short"), ["", ""]),
        (Fault("endless"), ["", ""]),
        (Fault("wrong"), ["", ""]),
        (Fault("cut"), RANGE_FROM_HALF),
        (Fault("stall"), RANGE_FROM_HALF),
        (Fault("chunked"), [""]),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_fault_that_passes(server, slide, fetch, tmp_path: Path, fault: Fault, ranges: list[str]):
    server.faults[slide.id] = [fault]
    assert fetch(slide)
    assert (tmp_path / "a.svs").read_bytes() == CONTENT
    assert not (tmp_path / "a.svs.part").exists()
    assert server.ranges[slide.id] == ranges
    assert fetch.progress == len(CONTENT)


@pytest.mark.parametrize(
    ("fault", "reason", "requests", "kept"),
    [
        ("503", r"HTTP 503.*run the same command", 3, -1),
        ("html", "33 bytes are offered", 3, -1),
        ("short", "200000 bytes are offered, 200001 are expected", 3, -1),
        ("endless", "more than 200001 bytes came", 3, -1),
        ("drop", "RemoteProtocolError", 3, -1),
        ("418", "HTTP 418", 1, -1),
        ("302", "HTTP 302", 1, -1),
        ("wrong", "has md5 .* in place of .*, twice", 2, -1),
        ("cut", "run the same command", 3, 175_000),
    ],
)
def test_a_fault_that_stays(server, slide, fetch, tmp_path, fault, reason, requests, kept):
    server.always[slide.id] = Fault(fault)
    with pytest.raises(ConnectionError, match=reason):
        fetch(slide)
    assert not (tmp_path / "a.svs").exists()
    assert size_of(tmp_path / "a.svs.part") == kept
    assert server.requests[slide.id] == requests


def test_nothing_is_followed_with_a_token(server, slide, fetch):
    with GdcServer() as thief:
        server.always[slide.id] = Fault("302", (("Location", f"{thief.url}/data/{slide.id}"),))
        with pytest.raises(ConnectionError, match="HTTP 302"):
            fetch(slide, token="granted")
        assert not thief.requests


def test_missing_and_closed_files(server, slide, fetch):
    server.controlled = {slide.id}
    with pytest.raises(ConnectionError, match=r"HTTP 403.*--token-file"):
        fetch(slide)
    with pytest.raises(ConnectionError, match="HTTP 403"):
        fetch(slide, token="expired")
    assert fetch(slide, token="granted")
    del server.contents[slide.id]
    with pytest.raises(ConnectionError, match=f"{slide.id}.*HTTP 404.*new manifest"):
        fetch(Stored(slide.id, "b.svs", slide.md5, 1), redownload=True)


@pytest.mark.parametrize("endpoint", ["ftp://a", "api.gdc.cancer.gov", "http://"])
def test_endpoints(endpoint: str):
    with pytest.raises(ValueError, match="is not a URL"):
        Gdc(endpoint)
    with pytest.raises(ValueError, match="unencrypted"):
        Gdc("http://api.gdc.cancer.gov", "secret")


PARTS = {
    "half": (CONTENT[:HALF], ["bytes=100000-"], 100_001),
    "one byte": (CONTENT[:1], ["bytes=1-"], 200_000),
    "all": (CONTENT, [], 0),
    "empty": (b"", [""], 200_001),
    "too long": (CONTENT + b"x", [""], 200_001),
    "wrong": (b"x" * HALF, ["bytes=100000-", ""], 300_002),
    "all wrong": (b"x" * len(CONTENT), [""], 200_001),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_there_is_not_fetched_again(server, slide, fetch, tmp_path: Path, part: str):
    content, ranges, sent = PARTS[part]
    (tmp_path / "a.svs.part").write_bytes(content)
    assert fetch(slide)
    assert (tmp_path / "a.svs").read_bytes() == CONTENT
    assert server.ranges[slide.id] == ranges
    assert server.bytes_sent[slide.id] == sent
    assert fetch.progress == len(CONTENT)


def test_servers_without_ranges_or_with_other_bytes(server, slide, fetch, tmp_path: Path):
    part, target = tmp_path / "a.svs.part", tmp_path / "a.svs"
    part.write_bytes(CONTENT[:HALF])
    server.ignores_ranges = True
    assert fetch(slide)
    assert server.ranges[slide.id] == ["bytes=100000-"]  # the answer to it served
    target.rename(part)
    part.write_bytes(CONTENT[1 : HALF + 1])  # another file's, say; the md5 tells
    server.ignores_ranges = False
    assert fetch(slide)
    assert target.read_bytes() == CONTENT
    assert server.ranges[slide.id][1:] == ["bytes=100000-", ""]


def test_an_error_page_does_not_cost_what_is_there(server, slide, fetch, tmp_path: Path):
    (tmp_path / "a.svs.part").write_bytes(CONTENT[:HALF])
    server.ignores_ranges, server.always[slide.id] = True, Fault("short")
    with pytest.raises(ConnectionError):
        fetch(slide)
    assert (tmp_path / "a.svs.part").read_bytes() == CONTENT[:HALF]


def test_content_that_became_shorter_or_other(server, slide, fetch, tmp_path: Path):
    server.contents[slide.id] = CONTENT[:50]
    (tmp_path / "a.svs.part").write_bytes(CONTENT[:HALF])
    with pytest.raises(ConnectionError, match="HTTP 416"):
        fetch(slide)
    (tmp_path / "a.svs.part").unlink()
    with pytest.raises(ConnectionError, match="50 bytes are offered, 200001 are expected"):
        fetch(slide)
    server.contents[slide.id] = CONTENT[::-1]
    with pytest.raises(ConnectionError, match="md5"):
        fetch(slide)
    assert not list(tmp_path.glob("a.svs*"))


def test_tries_start_anew_after_progress(server, slide, fetch, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gdc_download, "_PROGRESS", 3000)
    server.faults[slide.id] = [Fault("cut")] * 5
    assert fetch(slide)
    assert server.requests[slide.id] == 6  # three tries would have ended before
    (tmp_path / "a.svs").unlink()
    server.faults[slide.id] = [Fault("cut")] * 500
    with pytest.raises(ConnectionError):
        fetch(slide)
    assert server.requests[slide.id] < 30


def test_empty_files_need_no_request(server, fetch, tmp_path: Path):
    empty = server.add("empty.svs", b"")
    assert empty.md5 == "d41d8cd98f00b204e9800998ecf8427e"
    assert fetch(empty)
    assert size_of(tmp_path / "a.svs") == 0
    assert not server.requests


def test_files_that_are_there(server, slide, fetch, tmp_path: Path):
    target, wrong = tmp_path / "a.svs", b"x" * len(CONTENT)
    target.write_bytes(wrong)
    assert not fetch(slide)  # the size is right
    with pytest.raises(FileExistsError, match=r"md5 .* in place of .*--redownload"):
        fetch(slide, verify=True)
    assert target.read_bytes() == wrong
    assert not server.requests
    assert fetch(slide, verify=True, redownload=True)
    assert (target.read_bytes(), (tmp_path / "a.svs.bad-1").read_bytes()) == (CONTENT, wrong)
    assert not fetch(slide, verify=True, redownload=True)
    target.write_bytes(b"short")
    with pytest.raises(FileExistsError, match="5 bytes in place of 200001"):
        fetch(slide)
    assert fetch(slide, redownload=True)
    assert (target.read_bytes(), (tmp_path / "a.svs.bad-2").read_bytes()) == (CONTENT, b"short")
    target.unlink()
    target.mkdir()
    with pytest.raises(FileExistsError, match="is not a file"):
        fetch(slide, redownload=True)


def test_a_file_that_another_process_fetches(slide, fetch, tmp_path: Path):
    """In the end the other may have been faster."""
    part, target = tmp_path / "a.svs.part", tmp_path / "a.svs"
    code = f"""
import fcntl, sys
file = open({str(part)!r}, "wb")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="another process"):
            fetch(slide)
        assert part.exists()
        other.stdin.close()
    assert fetch(slide) and target.read_bytes() == CONTENT and not part.exists()


def test_every_byte_counts_towards_the_limit(server, slide, fetch):
    """100,000 + 100,001 of which some are wrong + 200,001; half a second's worth may come at once."""
    server.faults[slide.id] = [Fault("cut"), Fault("wrong")]
    start = time.monotonic()
    assert fetch(slide, limit=200_000)
    assert server.bytes_sent[slide.id] == 400_002
    assert time.monotonic() - start >= 1.5
