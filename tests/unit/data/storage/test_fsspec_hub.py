"""The hub's files and bytes are the local ones, whatever the server does."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.data.storage.base import LocalStorage, RangedFile
from dinov2.data.storage.fsspec import HubStorage
from dinov2.data.storage.retry import RemoteError, Retries
from tests.helpers.hub_server import RATE_LIMITED, RETRY_AFTER, Fault, HubServer, seeded_faults
from tests.helpers.ranges import NAMES, read_ranges

FAULTS = {"503": 0.08, "500": 0.04, "429": 0.08, "drop": 0.06, "cut": 0.06}


def test_files_are_listed_with_size_and_version(hub: HubServer, shards: Path, quick: Retries) -> None:
    commit = hub.push("org/tiles", shards)
    hub.page = 2
    storage = HubStorage("org/tiles", "", "", quick)
    assert storage.location == f"hf://datasets/org/tiles@{commit}"
    files = storage.list_files()
    assert [(file.name, file.size) for file in files] == [
        (file.name, file.size) for file in LocalStorage(str(shards)).list_files()
    ]
    assert hub.requests == {"info": 1, "tree": 4, "resolve": 1}  # eight entries in pages, the card
    before = files[1].version
    (shards / "data/a.parquet").write_bytes(b"other")
    after = storage.list_files()[1].version
    assert before != after
    assert len(after) == 64


def test_names_are_relative_to_the_folder(hub: HubServer, shards: Path, quick: Retries) -> None:
    commit = hub.push("org/tiles", shards)
    content = (shards / "data/deep/b.parquet").read_bytes()
    for path, names in {
        "data": ["a.parquet", "deep/b.parquet"],
        "/data/deep/": ["b.parquet"],
        "data/*.parquet": ["a.parquet"],
        "data/**/*.parquet": ["a.parquet", "deep/b.parquet"],
        "**/b*": ["data/deep/b.parquet"],
        "data/deep/b.parquet": ["b.parquet"],
        "data/deep/[b]*": ["b.parquet"],
    }.items():
        storage = HubStorage("org/tiles", "main", path, quick)
        assert storage.location == f"hf://datasets/org/tiles@{commit}/{path.strip('/')}"
        assert [file.name for file in storage.list_files()] == names
        if path != "data/*.parquet":
            assert storage.read_range(names[-1], 10, 100) == content[10:110]
    url = HubStorage("org/tiles", "main", "", quick).locate("c d.parquet")
    assert url == f"{hub.url}/datasets/org/tiles/resolve/{commit}/c%20d.parquet"


def test_one_range_is_one_request(hub: HubServer, shards: Path, quick: Retries) -> None:
    hub.push("org/tiles", shards)
    storage = HubStorage("org/tiles", "", "", quick)
    assert read_ranges(storage, shards, 0, 25) == 0
    whole = (shards / "data/a.parquet").read_bytes()
    assert storage.read_range("data/a.parquet", 0, len(whole)) == whole
    assert storage.read_range("data/a.parquet", 5, 0) == b""
    assert hub.requests["resolve"] <= 26
    assert hub.requests["cdn"] == hub.requests["resolve"] >= 20
    assert hub.requests.total() == 1 + 2 * hub.requests["resolve"]


def test_parquet_reads_through_it(hub: HubServer, tmp_path: Path, quick: Retries) -> None:
    table = pa.table({"image_bytes": [bytes([i]) * i for i in range(200)], "n": range(200)})
    (tmp_path / "real").mkdir()
    pq.write_table(table, tmp_path / "real/x.parquet", row_group_size=50)
    hub.push("org/real", tmp_path / "real")
    storage = HubStorage("org/real", "", "", replace(quick, outage_s=60))
    hub.faults = seeded_faults(3, FAULTS)
    (file,) = storage.list_files()
    assert pq.read_table(RangedFile(storage, file.name, file.size)).equals(table)


def test_bytes_are_the_local_ones_under_faults_from_threads(hub: HubServer, shards: Path, quick: Retries) -> None:
    hub.push("org/tiles", shards)
    hub.faults = seeded_faults(0, FAULTS)
    storage = HubStorage("org/tiles", "", "", replace(quick, outage_s=60))
    assert [file.name for file in storage.list_files()] == NAMES
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda seed: read_ranges(storage, shards, seed, 15), range(8))) == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_bytes_are_the_local_ones_in_another_process(hub: HubServer, shards: Path, quick: Retries, method: str) -> None:
    hub.push("org/tiles", shards)
    storage = HubStorage("org/tiles", "", "", replace(quick, outage_s=60))
    assert read_ranges(storage, shards, 0, 5) == 0  # so that there are connections to inherit
    hub.faults = seeded_faults(1, FAULTS)
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply_async(read_ranges, (storage, shards, 1))
        assert read_ranges(storage, shards, 2) == 0
        assert there.get(60) == 0


def test_a_server_that_falls_silent_is_left(hub: HubServer, shards: Path, quick: Retries) -> None:
    hub.push("org/tiles", shards)
    impatient = replace(quick, read_s=0.3)
    for _ in range(2):  # the redirect and the file itself
        hub.faults = [Fault("hang")]
        assert read_ranges(HubStorage("org/tiles", "", "", impatient), shards, 4, 2) == 0
    hub.faults = [None, Fault("hang")]
    storage = HubStorage("org/tiles", "", "", impatient)
    assert len(storage.list_files()) == 3
    hub.faults = [Fault("hang")] * 2
    with pytest.raises(RemoteError, match="ReadTimeout"):
        HubStorage("org/tiles", "", "", replace(impatient, outage_s=0.1))


@pytest.mark.parametrize("fault", [RATE_LIMITED, RETRY_AFTER], ids=["ratelimit", "retry-after"])
def test_a_limit_is_waited_for(hub: HubServer, shards: Path, quick: Retries, fault: Fault) -> None:
    hub.push("org/tiles", shards)
    waits: list[float] = []
    storage = HubStorage("org/tiles", "", "", replace(quick, sleep=waits.append, first_wait_s=1.0))
    hub.faults = [fault]
    assert storage.read_range("c d.parquet", 0, 1) == (shards / "c d.parquet").read_bytes()
    assert 1.5 <= waits[0] <= 2


def test_the_commit_is_kept(hub: HubServer, shards: Path, quick: Retries) -> None:
    first = hub.push("org/tiles", shards)
    storage = HubStorage("org/tiles", "", "data", quick)
    hub.push("org/tiles", shards / "data/deep")
    assert HubStorage("org/tiles", "", "", quick).location != f"hf://datasets/org/tiles@{first}"
    hub.requests.clear()
    for same in (storage, HubStorage("org/tiles", first, "data", quick)):
        assert same.location == f"hf://datasets/org/tiles@{first}/data"
        assert [file.name for file in same.list_files()] == ["a.parquet", "deep/b.parquet"]
        assert len(same.read_range("a.parquet", 1, 70_000)) == 70_000
    assert hub.requests == {"tree": 2, "resolve": 2, "cdn": 2}


def test_private_and_gated_datasets(
    hub: HubServer, shards: Path, quick: Retries, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push("org/tiles", shards)
    hub.tokens["org/tiles"] = "granted"
    hidden = r"has no dataset 'org/tiles', or it is private and no token is set; check the name, set HF_TOKEN or run"
    for revision in ("", commit):
        with pytest.raises(FileNotFoundError, match=hidden):
            HubStorage("org/tiles", revision, "", quick).list_files()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FileNotFoundError, match="or it is private and the token in use may not read it") as caught:
        HubStorage("org/tiles", "", "", quick)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "granted")
    storage = HubStorage("org/tiles", "", "", quick)
    assert read_ranges(storage, shards, 0, 3) == 0
    assert b"granted" not in pickle.dumps(storage)
    assert hub.tokens_seen == {"hf_wrong", "granted"}

    hub.tokens.clear()
    hub.gated.add("org/tiles")
    assert len(storage.list_files()) == 3
    for token, message in {"": "no token is set", "hf_wrong": "the token in use may not read it"}.items():
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=f"is private or gated and {message}; ask for access on its page"):
            HubStorage("org/tiles", "", "", quick).list_files()
        with pytest.raises(PermissionError, match="private or gated"):
            storage.read_range("c d.parquet", 0, 1)


def test_what_is_not_there(hub: HubServer, shards: Path, quick: Retries) -> None:
    commit = hub.push("org/tiles", shards)
    for path, message in {
        "none": f"has no folder 'none' at commit {commit}",
        "data/none.parquet": f"'hf://datasets/org/tiles@{commit}/data/none.parquet' holds no Parquet file",
        "data/*.csv": "holds no Parquet file; at least one is expected",
        "README.md": "has no folder 'README.md'",
    }.items():
        with pytest.raises(FileNotFoundError, match=message.replace("*", r"\*")):
            HubStorage("org/tiles", "", path, quick).list_files()
    with pytest.raises(ValueError, match=r"has no revision 'b{40}'; a branch, a tag or a commit is expected"):
        HubStorage("org/tiles", "b" * 40, "", quick).list_files()
    storage = HubStorage("org/tiles", "", "", quick)
    with pytest.raises(FileNotFoundError, match=r"has no http://.*/gone.parquet"):
        storage.read_range("gone.parquet", 0, 1)
    with pytest.raises(RemoteError, match=r"gave HTTP 416"):
        storage.read_range("data/a.parquet", 80_000, 1)
    with pytest.raises(RemoteError, match="1 of 9 bytes"):
        storage.read_range("data/a.parquet", 70_000, 9)


def test_a_server_without_ranges_is_refused(hub: HubServer, shards: Path, quick: Retries) -> None:
    hub.push("org/tiles", shards)
    hub.ignores_ranges = True
    storage = HubStorage("org/tiles", "", "", quick)
    whole = (shards / "data/a.parquet").read_bytes()
    assert storage.read_range("data/a.parquet", 0, len(whole)) == whole
    for start, length in [(0, 10), (10, 10), (1, len(whole) - 1)]:
        with pytest.raises(RemoteError, match=f"was asked for bytes {start} to {start + length - 1} and gave others"):
            storage.read_range("data/a.parquet", start, length)
    assert hub.requests["resolve"] == 4  # asking again would not help


def test_links_to_the_storage_behind_the_hub_are_not_told(hub: HubServer, shards: Path, quick: Retries) -> None:
    hub.push("org/tiles", shards)
    storage = HubStorage("org/tiles", "", "", replace(quick, outage_s=0))
    hub.faults = [None, Fault("503")]
    with pytest.raises(RemoteError, match="HTTP 503") as caught:
        storage.read_range("c d.parquet", 0, 1)
    assert "Signature" not in str(caught.value)
