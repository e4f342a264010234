"""Which of the locations a name leads to, and what is said where it leads nowhere."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dinov2.data.storage.base import LocalStorage
from dinov2.data.storage.fsspec import ObjectStorage
from dinov2.data.storage.locate import open_storage
from tests.helpers.hub_server import HubServer
from tests.helpers.ranges import NAMES


def names(dataset: str, revision: str = "") -> list[str]:
    """What a dataset lists."""
    return [file.name for file in open_storage(dataset, revision, outage_s=0).list_files()]


def test_a_local_path_wins_over_the_hub(
    hub: HubServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("org/tiles", shards)
    monkeypatch.chdir(tmp_path)
    assert names("org/tiles") == NAMES
    (tmp_path / "org/tiles").mkdir(parents=True)
    (tmp_path / "org/tiles/local.parquet").touch()
    assert names("org/tiles") == ["local.parquet"]
    assert names("org/*/*.parquet") == ["tiles/local.parquet"]
    assert names("hf://datasets/org/tiles") == NAMES
    assert names(f"file://{tmp_path}/org/tiles") == ["local.parquet"]
    assert isinstance(open_storage(f"file://{tmp_path}/org"), LocalStorage)
    assert isinstance(open_storage("memory://org/tiles"), ObjectStorage)


def test_revisions_of_a_hub_dataset(hub: HubServer, shards: Path, tmp_path: Path) -> None:
    old = hub.push("org/tiles", shards, "v1")
    pulled = hub.push("org/tiles", shards / "data", "refs/pr/3")
    main = hub.push("org/tiles", shards / "data/deep")
    for dataset, revision, commit in [
        ("org/tiles", "", main),
        ("org/tiles", "v1", old),
        ("org/tiles@v1", "", old),
        ("org/tiles@v1", "v1", old),
        ("org/tiles@v1", main, main),
        ("org/tiles@refs/pr/3", "", pulled),
        ("org/tiles@refs%2Fpr%2F3", "", pulled),
        (f"hf://datasets/org/tiles@{old}", "", old),
    ]:
        assert open_storage(dataset, revision).location == f"hf://datasets/org/tiles@{commit}"
    assert open_storage("hf://datasets/org/tiles@refs/pr/3/deep/").location.endswith(f"@{pulled}/deep")
    assert names("hf://datasets/org/tiles@refs/pr/3/deep") == ["b.parquet"]
    assert names("org/tiles@v1") == NAMES


@pytest.mark.parametrize(
    "dataset", ["/no/where", "./org/tiles", "~/no/where", "a/b/c", "one", "org/a.parquet", "a/[b", ""]
)
def test_what_can_only_be_local_is_not_sought_elsewhere(hub: HubServer, dataset: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        names(dataset)
    assert re.match(f"dataset '{re.escape(dataset)}' (does not exist; give a folder|holds no)", str(caught.value))
    assert hub.requests.total() == 0


@pytest.mark.parametrize(
    ("dataset", "revision", "kind", "message"),
    [
        (
            "org/none",
            "",
            FileNotFoundError,
            "there is no local path 'org/none', and {url} has no dataset 'org/none', or",
        ),
        (
            "org/tiles",
            "v9",
            ValueError,
            "there is no local path .* has no revision 'v9'; a branch, a tag or a commit",
        ),
        ("org/tiles@v9", "", ValueError, "has no revision 'v9'"),
        ("org/tiles@main", "v9", ValueError, "'org/tiles@main' and revision 'v9' disagree"),
        (
            "hf://org/tiles",
            "",
            ValueError,
            r"'hf://org/tiles' is unknown; hf://datasets/org/name\[@revision\]",
        ),
        ("hf://datasets/tiles", "", ValueError, "'hf://datasets/tiles' is unknown"),
        ("hf://datasets/a/b--c", "", ValueError, "b--c"),
        ("s3://tiles", "v9", ValueError, "'s3://tiles' has no revisions, so 'v9' cannot be taken"),
        ("{folder}", "v9", ValueError, "has no revisions, so 'v9' cannot be taken"),
        ("nowhere://tiles", "", ValueError, "'nowhere://tiles' cannot be opened .Protocol not known"),
        ("s3://", "", ValueError, "'s3://' names no location"),
        (
            "http://127.0.0.1:1/tiles",
            "",
            OSError,
            "ClientConnectorError",
        ),
        (
            "http://127.0.0.1:1/a.parquet",
            "",
            OSError,
            "ClientConnectorError",
        ),
    ],
)
def test_bad_names(
    hub: HubServer, shards: Path, dataset: str, revision: str, kind: type[Exception], message: str
) -> None:
    hub.push("org/tiles", shards)
    with pytest.raises(kind, match=message.format(url=hub.url)) as caught:
        names(dataset.format(folder=shards), revision)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"there is no local path 'org/tiles', and 'http://127.0.0.1:1/api/.*' could not"):
        names("org/tiles")


@pytest.mark.parametrize(
    ("scheme", "package", "message"),
    [
        ("s3", "s3fs", "a package for s3:// is not installed: PATHFM_EXTRAS=dev,slides,s3 ./install.sh"),
        ("gs", "gcsfs", "a package for gs:// is not installed: Please install gcsfs"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, message: str) -> None:
    loaded = import_module("fsspec.registry")._registry
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("s3", "s3a", "gs"):
        monkeypatch.delitem(loaded, name, raising=False)
    with pytest.raises(ImportError, match=message):
        open_storage(f"{scheme}://a-bucket/of-{package}")
