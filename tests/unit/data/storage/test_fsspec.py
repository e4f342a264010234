"""Object stores and web servers give the local bytes, in forked processes too."""

import gc
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from dinov2.data.storage.base import LocalStorage, Storage
from dinov2.data.storage.fsspec import ObjectStorage
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.retry import RemoteError, Retries
from tests.helpers.hub_server import HubServer, seeded_faults
from tests.helpers.ranges import NAMES, read_ranges


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Address of an S3 stand-in."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with the shards below a prefix, reached by the usual variables."""
    import boto3

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{name}", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    client = boto3.client("s3")
    client.create_bucket(Bucket="slides")
    for path in filter(Path.is_file, shards.rglob("*")):
        client.put_object(Bucket="slides", Key=f"tiles/{path.relative_to(shards)}", Body=path.read_bytes())
    client.put_object(Bucket="slides", Key="tiles-2/z.parquet", Body=b"beside")
    yield "slides"
    for item in client.list_objects_v2(Bucket="slides")["Contents"]:
        client.delete_object(Bucket="slides", Key=item["Key"])
    client.delete_bucket(Bucket="slides")


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """A server of plain folders, which knows no ranges."""
    handler = type("_Silent", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_s3_lists_and_reads_like_a_folder(bucket: str, shards: Path, quick: Retries) -> None:
    storage = ObjectStorage(f"s3://{bucket}/tiles/", quick)
    assert storage.location == "s3://slides/tiles"
    assert storage.locate(NAMES[0]) == "s3://slides/tiles/c d.parquet"
    expected = [(file.name, file.size) for file in LocalStorage(str(shards)).list_files()]
    assert [(file.name, file.size) for file in storage.list_files()] == expected
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda seed: read_ranges(storage, shards, seed), range(4))) == 0
    for inside, names in {
        "": ["tiles-2/z.parquet", *(f"tiles/{name}" for name in NAMES)],
        "/tiles/data": ["a.parquet", "deep/b.parquet"],
        "/tiles/data/*.parquet": ["a.parquet"],
        "/tiles/**/*.parquet": NAMES,
        "/tiles/data/a.parquet": ["a.parquet"],
    }.items():
        storage = ObjectStorage(f"s3://{bucket}{inside}", quick)
        assert [file.name for file in storage.list_files()] == names
    assert storage.read_range("a.parquet", 3, 9) == (shards / "data/a.parquet").read_bytes()[3:12]


def test_s3_changes_are_seen(bucket: str, quick: Retries) -> None:
    import boto3

    storage = ObjectStorage(f"s3://{bucket}/tiles-2", quick)
    (before,) = storage.list_files()
    boto3.client("s3").put_object(Bucket=bucket, Key="tiles-2/z.parquet", Body=b"BESIDE")
    boto3.client("s3").put_object(Bucket=bucket, Key="tiles-2/y.parquet", Body=b"new")
    new, after = storage.list_files()
    assert (after.name, after.size) == (before.name, before.size) == ("z.parquet", 6)
    assert after.version != before.version
    assert new.name == "y.parquet"


def read_in_child(storage: Storage, folder: Path, seed: int) -> int:
    """Read as a process that was forked, which lets go of what it inherited."""
    gc.collect()
    wrong = read_ranges(storage, folder, seed)
    gc.collect()
    return wrong


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_forked_processes_and_their_parent(
    bucket: str, hub: HubServer, shards: Path, quick: Retries, kind: str
) -> None:
    commit = hub.push("org/tiles", shards)
    url = {"s3": f"s3://{bucket}/tiles", "http": f"{hub.url}/datasets/org/tiles/resolve/{commit}"}[kind]
    # One try and little patience: a connection that a child took away from its parent shows.
    storage = ObjectStorage(url, replace(quick, outage_s=0))
    assert read_ranges(storage, shards, 0) == 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.starmap_async(read_in_child, [(storage, shards, seed) for seed in (1, 2)])
        assert read_ranges(storage, shards, 3) == 0
        assert there.get(60) == [0, 0]
        assert read_ranges(storage, shards, 4) == 0
    assert read_ranges(storage, shards, 5) == 0


def test_s3_errors(bucket: str, quick: Retries, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in {
        "s3://no-such-bucket": "'s3://no-such-bucket' does not exist",
        "s3://slides/none": "dataset 's3://slides/none' holds no Parquet file",
        "s3://slides/tile": "holds no Parquet file",
        "s3://slides/none.parquet": "'s3://slides/none.parquet' does not exist",
        "s3://slides/tiles/*.csv": r"'s3://slides/tiles/\*.csv' holds no Parquet file",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            ObjectStorage(url, quick).list_files()
    storage = ObjectStorage("s3://slides/tiles", quick)
    with pytest.raises(FileNotFoundError, match=r"'s3://slides/tiles/gone.parquet' does not exist"):
        storage.read_range("gone.parquet", 0, 1)
    with pytest.raises(RemoteError, match="1 of 9 bytes"):
        storage.read_range("data/a.parquet", 70_000, 9)
    with pytest.raises(RemoteError, match="HTTP 416"):
        storage.read_range("data/a.parquet", 80_000, 9)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(PermissionError, match=r"may not be read .NoCredentialsError .*; check the credentials"):
        ObjectStorage("s3://slides/tiles", replace(quick, read_s=6.0)).list_files()


def test_a_store_that_fails_now_and_then(hub: HubServer, shards: Path, quick: Retries) -> None:
    commit = hub.push("org/tiles", shards)
    storage = ObjectStorage(f"{hub.url}/datasets/org/tiles/resolve/{commit}", replace(quick, outage_s=30))
    hub.faults = seeded_faults(0, {"503": 0.1, "429": 0.05, "drop": 0.05, "cut": 0.05})
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda seed: read_ranges(storage, shards, seed, 5), range(4))) == 0
    single = ObjectStorage(storage.locate("data/a.parquet"), storage._retries)
    assert [(file.name, file.size) for file in single.list_files()] == [("a.parquet", 70_001)]


def test_a_web_server_that_lists_its_folders(tmp_path: Path, shards: Path, quick: Retries) -> None:
    with web_server(shards) as url:
        storage = ObjectStorage(url, quick)
        files = storage.list_files()
        assert [(file.name, file.size) for file in files] == [
            ("c%20d.parquet", 1),
            ("data/a.parquet", 70_001),
            ("data/deep/b.parquet", 5000),
        ]
        assert all(file.version for file in files)
        assert [file.name for file in open_storage(f"{url}/data/*.parquet").list_files()] == ["a.parquet"]
        whole = (shards / "data/a.parquet").read_bytes()
        assert storage.read_range("data/a.parquet", 0, len(whole)) == whole
        with pytest.raises(RemoteError):
            storage.read_range("data/a.parquet", 1, 10)
        for missing in ("none", "none.parquet"):
            with pytest.raises(FileNotFoundError, match=f"{missing}' does not exist"):
                ObjectStorage(f"{url}/{missing}", quick).list_files()


def test_names_in_braces_need_no_listing(shards: Path, quick: Retries, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(shards) as url:
        monkeypatch.setattr(SimpleHTTPRequestHandler, "list_directory", lambda self, path: self.send_error(403))
        files = ObjectStorage(f"{url}/data/{{a,deep/b}}.parquet", quick).list_files()
        assert [(file.name, file.size) for file in files] == [("a.parquet", 70_001), ("deep/b.parquet", 5000)]
        with pytest.raises(FileNotFoundError, match="does not exist"):
            ObjectStorage(f"{url}/data/{{a,c}}.parquet", quick).list_files()


def test_memory(shards: Path, quick: Retries) -> None:
    files = fsspec.filesystem("memory")
    files.put(f"{shards}/", "memory://stored/tiles/", recursive=True)
    storage = pickle.loads(pickle.dumps(ObjectStorage("memory://stored/tiles", quick)))
    assert [file.name for file in storage.list_files()] == NAMES
    assert read_ranges(storage, shards, 0) == 0
    with pytest.raises(FileNotFoundError, match=r"'memory://stored/tiles/gone.parquet' does not exist"):
        storage.read_range("gone.parquet", 0, 1)
    files.rm("memory://stored", recursive=True)


def test_secrets_of_a_url_are_not_told(quick: Retries) -> None:
    storage = ObjectStorage("http://me:secret@127.0.0.1:1/tiles", replace(quick, outage_s=0))
    assert storage.location == "http://127.0.0.1:1/tiles"
    with pytest.raises(RemoteError) as caught:
        storage.list_files()
    assert "secret" not in str(caught.value)
    assert storage.locate("a.parquet?Signature=secret") == "http://127.0.0.1:1/tiles/a.parquet"
