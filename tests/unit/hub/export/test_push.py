"""Exports on the hub, against a stand-in of it that commits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from dinov2.hub.export.push import push
from tests.helpers.hub_server import HubServer

TOKEN, REPO = "hf_stand_in_token", "org/teacher"
NAMES = ["weights.pth", "README.md"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that this process asks, with a token that may write."""
    with HubServer() as server:
        server.writers.add(TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*NAMES, "other"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    return tmp_path


def contents(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    _, folder = hub.find(REPO, revision)
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_new_repository_gets_the_named_files(hub: HubServer, folder: Path):
    assert push(folder, NAMES, REPO) == f"{hub.url}/{REPO}"
    assert contents(hub) == {name: (folder / name).read_bytes() for name in NAMES}
    assert not hub.private and hub.requests["commit"] == 1


def test_the_same_files_are_not_sent_again(hub: HubServer, folder: Path):
    push(folder, NAMES, REPO)
    commit, _ = hub.find(REPO, "main")
    push(folder, NAMES, REPO)
    assert hub.find(REPO, "main")[0] == commit and hub.requests["commit"] == hub.requests["preupload"] == 1


def test_other_contents_are_replaced_only_when_told(hub: HubServer, folder: Path):
    push(folder, NAMES, REPO)
    before = contents(hub)
    (folder / "weights.pth").write_bytes(b"n" * (100 * len("weights.pth")))  # of the same size
    (folder / "new").touch()
    with pytest.raises(FileExistsError, match=r"weights\.pth"):
        push(folder, [*NAMES, "new"], REPO)
    assert contents(hub) == before
    push(folder, [*NAMES, "new"], REPO, replace=True)
    assert contents(hub) == {name: (folder / name).read_bytes() for name in [*NAMES, "new"]}


def test_a_branch_of_its_own(hub: HubServer, folder: Path):
    push(folder, NAMES[:1], REPO)
    (folder / "README.md").write_text("of the branch")
    for _ in range(2):
        assert push(folder, NAMES, REPO, revision="v2") == f"{hub.url}/{REPO}/tree/v2"
    assert contents(hub).keys() == {"weights.pth"} and contents(hub, "v2")["README.md"] == b"of the branch"


def test_private(hub: HubServer, folder: Path):
    push(folder, NAMES, REPO, private=True)
    assert hub.private == {REPO}
    push(folder, NAMES, REPO, private=True)
    hub.private.clear()
    (folder / "README.md").write_text("secret")
    with pytest.raises(ValueError, match="public"):
        push(folder, NAMES, REPO, private=True, replace=True)
    assert contents(hub)["README.md"] != b"secret"


@pytest.mark.parametrize("token", ["", "hf_of_a_reader"])
def test_no_right_to_write(hub: HubServer, folder: Path, token: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match="HF_TOKEN") as caught:
        push(folder, NAMES, REPO)
    assert "\n" not in str(caught.value) and "hf_of_a_reader" not in str(caught.value)
    assert not hub.knows(REPO)


def test_a_commit_of_somebody_else_meanwhile(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch):
    push(folder, NAMES[:1], REPO)
    create = huggingface_hub.HfApi.create_commit

    def late(self: huggingface_hub.HfApi, *args: object, **kwargs: object) -> object:
        commit, _ = hub.find(REPO, "main")
        hub.commit(REPO, "main", commit, {"README.md": b"theirs"})
        return create(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(OSError, match="does not take the files"):
        push(folder, NAMES, REPO)
    assert contents(hub)["README.md"] == b"theirs"


def test_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with HubServer() as hub:
        url = hub.url
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="does not take the files"):
        push(folder, NAMES, REPO)
