"""Checkpoint folders: atomic, verified, retained, read on any number of ranks, never trusted."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dinov2.fsdp import Checkpointer, full_state_dict, load_full_state_dict, shard
from dinov2.utils import files
from tests.helpers.checkpoints import CHECKSUMS, flip, seal, unseal
from tests.helpers.spawn import run_ranks


def tensors(value: float) -> dict:
    return {
        "student": {"weight": torch.full((4, 3), value)},
        "optimizer": {"weight": {"step": torch.tensor(value)}},
    }


def test_newest_are_kept_and_named(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (5, 10, 20):
        checkpointer.save(step, tensors(step), {"step": step})
    assert checkpointer.steps() == [10, 20]
    assert (tmp_path / "last_checkpoint").read_text() == "step_0000020"
    assert checkpointer.newest(a_mapping)["step"] == 20
    loaded = tensors(0)
    checkpointer.load(20, loaded)
    assert (loaded["student"]["weight"] == 20).all() and loaded["optimizer"]["weight"]["step"] == 20


def test_folders_of_a_save_that_was_killed_are_not_checkpoints(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    half = tmp_path / "checkpoints" / "step_0000007.incomplete"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{}")
    (half / "__0_0.distcp").write_bytes(b"half")
    assert checkpointer.steps() == []
    other = tmp_path / "checkpoints" / "step_mine.incomplete"
    other.mkdir()
    checkpointer.sweep()
    assert not half.exists() and other.exists()
    checkpointer.save(7, tensors(7), {})
    assert checkpointer.steps() == [7]


def test_users_files_beside_checkpoints_stay(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for name in ("notes", "step_best", "step_0000001_mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {})
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"notes", "step_best", "step_0000001_mine", "step_0000002"}


def test_multiples_are_kept_beside_the_newest(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=2, keep_every=6)
    for step in range(2, 19, 2):
        checkpointer.save(step, tensors(step), {})
    assert checkpointer.steps() == [6, 12, 16, 18]


def test_what_cannot_be_deleted_stays_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As where another machine still reads it over NFS."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, tensors(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        checkpointer.save(2, tensors(2), {"step": 2})
        checkpointer.sweep()
    assert checkpointer.steps() == [2] and checkpointer.newest(a_mapping)["step"] == 2
    assert "step_0000001" in caplog.text
    checkpointer.sweep()
    assert [path.name for path in checkpointer.folder.iterdir()] == ["step_0000002"]


def busy(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))


def test_checkpoints_that_were_moved_and_linked(tmp_path: Path):
    """A link is read as what it leads to; with an old checkpoint the link alone is deleted."""
    checkpointer, elsewhere = Checkpointer(tmp_path / "run", keep=1), tmp_path / "elsewhere"
    checkpointer.save(1, tensors(1), {"step": 1})
    checkpointer.path(1).rename(elsewhere)
    checkpointer.path(1).symlink_to(elsewhere)
    assert checkpointer.newest(a_mapping) == {"step": 1, "checksums": CHECKSUMS}
    checkpointer.save(2, tensors(2), {"step": 2})
    assert [path.name for path in checkpointer.folder.iterdir()] == ["step_0000002"]
    assert contents(elsewhere).keys() == set(FILES)


def test_a_link_that_leads_nowhere_is_no_corrupt_checkpoint(copy: Path):
    """Its disk may not be there yet: the one before is not taken in its place, nor is the run begun anew."""
    checkpointer = Checkpointer(copy, keep=2)
    newest = checkpointer.path(2)
    newest.rename(copy / "elsewhere")
    newest.symlink_to(copy / "away")
    with pytest.raises(FileNotFoundError, match="away"):
        checkpointer.newest(a_mapping)
    assert newest.is_symlink() and checkpointer.steps() == [1]


FILES = (".metadata", "__0_0.distcp", "state.json", CHECKSUMS)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    checkpointer = Checkpointer(folder, keep=2)
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {"step": step, "of": "a run"})
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "copy")


def a_mapping(written: object) -> dict:
    if not isinstance(written, dict):
        raise ValueError("not a mapping")
    return written


def contents(folder: Path) -> dict[str, bytes | None]:
    """Bytes of the files; None of what is none, a folder or a link to nowhere."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def assert_falls_back(run: Path, damaged: dict[str, bytes | None]) -> None:
    """The checkpoint of step 2 is not taken, that of step 1 is, and nothing is lost of either."""
    checkpointer = Checkpointer(run, keep=2)
    first = contents(checkpointer.path(1))
    assert checkpointer.newest(a_mapping)["step"] == 1
    assert checkpointer.steps() == [1] and (run / "last_checkpoint").read_text() == "step_0000001"
    assert contents(checkpointer.path(1)) == first
    assert contents(run / "checkpoints/step_0000002.corrupt") == damaged


def test_what_is_listed_are_all_files(two: Path):
    assert contents(two / "checkpoints/step_0000002").keys() == set(FILES)


def test_every_flipped_bit_is_found(two: Path, tmp_path: Path):
    """200 bits over all files, in proportion to nothing: small files decide as much as large ones."""
    random = Random(0)
    for number in range(200):
        run = shutil.copytree(two, tmp_path / str(number))
        newest = run / "checkpoints/step_0000002"
        path = newest / FILES[number % len(FILES)]
        flip(path, random.randrange(8 * path.stat().st_size))
        assert_falls_back(run, contents(newest))
        shutil.rmtree(run)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 0.5, -1, None], ids=["empty", "half", "last byte", "missing"])
def test_truncated_and_missing_files_are_found(copy: Path, name: str, left: float | None):
    path = copy / "checkpoints/step_0000002" / name
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[: int(left * len(content)) if left >= 0 else left])
    assert_falls_back(copy, contents(path.parent))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to(path.name)], ids=["folder", "loop of links"])
def test_what_is_no_file_is_found(copy: Path, name: str, put: Callable[[Path], None]):
    path = copy / "checkpoints/step_0000002" / name
    path.unlink()
    put(path)
    assert_falls_back(copy, contents(path.parent))


def test_checksums_cut_at_a_line_are_found(copy: Path):
    path = copy / "checkpoints/step_0000002" / CHECKSUMS
    for kept in itertools.count():
        lines = (copy / "checkpoints/step_0000001" / CHECKSUMS).read_text().splitlines(keepends=True)
        if kept == len(lines):
            break
        path.write_text("".join(lines[:kept]))
        run = shutil.copytree(copy, copy.parent / str(kept))
        assert_falls_back(run, contents(path.parent))


def test_xxhsum_reads_the_checksums(two: Path):
    """Its format: 32 digits, two blanks, the name; the digest is that of all bytes of the file."""
    folder = two / "checkpoints/step_0000002"
    before = (folder / CHECKSUMS).read_text()
    seal(folder)
    assert (folder / CHECKSUMS).read_text() == before


def test_nothing_set_aside_is_overwritten(copy: Path):
    checkpointer = Checkpointer(copy, keep=2)
    for _ in range(2):
        (checkpointer.path(2) / "state.json").write_text("{")
        assert checkpointer.newest(a_mapping)["step"] == 1
        checkpointer.save(2, tensors(2), {"step": 2})
    aside = [path.name for path in checkpointer.folder.glob("step_0000002.corrupt*")]
    assert sorted(aside) == ["step_0000002.corrupt", "step_0000002.corrupt.2"]


def test_a_run_without_a_checkpoint_left_does_not_start_anew(copy: Path):
    checkpointer = Checkpointer(copy, keep=2)
    for step in (1, 2):
        (checkpointer.path(step) / "__0_0.distcp").unlink()
    for _ in range(2):  # nor at the next launch
        with pytest.raises(ValueError):
            checkpointer.newest(a_mapping)
    assert Checkpointer(copy / "new", keep=2).newest(a_mapping) is None


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(copy: Path):
    checkpointer = Checkpointer(copy, keep=2)
    checkpointer.folder.rename(copy / "elsewhere")
    for _ in range(2):
        with pytest.raises(ValueError, match="last_checkpoint"):
            checkpointer.newest(a_mapping)
    (copy / "elsewhere").rename(checkpointer.folder)
    assert checkpointer.newest(a_mapping)["step"] == 2


@pytest.mark.parametrize("step", [1, 3, "2", None])
def test_a_state_of_another_step_is_none(copy: Path, step: object):
    newest = copy / "checkpoints/step_0000002"
    unseal(newest)
    (newest / "state.json").write_text(json.dumps({"step": step}))
    assert_falls_back(copy, contents(newest))


def test_a_checkpoint_without_checksums_of_an_earlier_version(copy: Path):
    checkpointer = Checkpointer(copy, keep=2)
    unseal(checkpointer.path(2))
    assert checkpointer.newest(a_mapping) == {"step": 2, "of": "a run"}
    loaded = tensors(0)
    checkpointer.load(2, loaded)
    assert (loaded["student"]["weight"] == 2).all()


def test_an_intact_state_of_another_version_is_refused_and_stays(copy: Path):
    def decode(written: dict) -> dict:
        raise ValueError("of = 'a run' is not known")

    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with pytest.raises(ValueError):
        Checkpointer(copy, keep=2).newest(decode)
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


@pytest.mark.parametrize(("number", "is_damage"), [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)])
def test_a_file_that_cannot_be_read(copy: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool):
    """A bad sector is damage; a denied access or a lost server says nothing of the file."""
    checksum = files.checksum

    def failing(path: Path) -> str:
        if path.parent.name == "step_0000002" and path.suffix == ".distcp":
            raise OSError(number, "cannot be read", str(path))
        return checksum(path)

    monkeypatch.setattr(files, "checksum", failing)
    before = contents(copy / "checkpoints/step_0000002")
    if is_damage:
        assert_falls_back(copy, before)
        return
    with pytest.raises(OSError):
        Checkpointer(copy, keep=2).newest(a_mapping)
    assert contents(copy / "checkpoints/step_0000002") == before


def test_without_room_nothing_is_written_and_nothing_deleted(copy: Path, monkeypatch: pytest.MonkeyPatch):
    checkpointer = Checkpointer(copy, keep=1)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*")}
    large = {"weight": torch.zeros(1 << 18)}  # 1 MiB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError):
        checkpointer.save(3, large, {})
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.*")}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 << 20))
    checkpointer.save(3, large, {})
    assert checkpointer.steps() == [3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("is_told", [True, False], ids=["free room told", "a quota that no one tells of"])
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up(small_disk: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool, background: bool):
    if not is_told:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    checkpointer = Checkpointer(small_disk, keep=1, background=background)
    for kib in (0, 100, 300, 500, 700):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(kib << 10))
        step = kib + 1
        content = {"weight": torch.full((1 << 16,), float(kib))}  # 256 KiB
        if kib <= 300:  # two and the filler fit
            checkpointer.save(step, content, {"step": step})
            checkpointer.finish()
        else:
            with pytest.raises(OSError):
                checkpointer.save(step, content, {"step": step})
                checkpointer.finish()
            assert checkpointer.steps() == [301]
            assert [path.name for path in checkpointer.folder.iterdir()] == ["step_0000301"]
            assert checkpointer.newest(a_mapping)["step"] == 301
    filler.unlink()
    checkpointer.save(999, content, {"step": 999})
    checkpointer.finish()
    assert checkpointer.steps() == [999]


def test_in_the_background_later_steps_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The save begins when the weights have moved on, and holds what they were."""
    moved, write = threading.Event(), torch.distributed.checkpoint.save

    def late(*args: object, **kwargs: object) -> None:
        assert moved.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(torch.distributed.checkpoint, "save", late)
    checkpointer, content = Checkpointer(tmp_path, keep=1, background=True), tensors(1)
    checkpointer.save(1, content, {"step": 1})
    content["student"]["weight"].fill_(7)
    content["optimizer"]["weight"]["step"].fill_(7)
    assert checkpointer.steps() == []
    moved.set()
    checkpointer.finish()
    loaded = tensors(0)
    checkpointer.load(1, loaded)
    assert (loaded["student"]["weight"] == 1).all() and loaded["optimizer"]["weight"]["step"] == 1


def test_contents_may_change_from_one_background_save_to_the_next(tmp_path: Path):
    """Copies are used again only where they fit: values, a shape, a dtype, a name and the number of tensors."""
    checkpointer = Checkpointer(tmp_path, keep=9, background=True)
    contents = [{"a": torch.full((4,), 1.0)}, {"a": torch.full((4,), 2.0)}, {"a": torch.full((1,), 3.0)},
                {"a": torch.full((1,), 4, dtype=torch.int32)}, {"b": torch.full((1,), 5)},
                {"a": torch.ones(2), "b": torch.ones(())}]  # fmt: skip
    for step, content in enumerate(contents, 1):
        checkpointer.save(step, content, {"step": step})
    checkpointer.finish()
    for step, content in enumerate(contents, 1):
        loaded = {key: torch.zeros_like(value) for key, value in content.items()}
        checkpointer.load(step, loaded)
        assert all(torch.equal(loaded[key], value) for key, value in content.items())


@pytest.mark.parametrize("by", ["finish", "save"])
def test_a_failure_in_the_background_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer = Checkpointer(tmp_path, keep=1, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed.checkpoint, "save", full)
        checkpointer.save(1, tensors(1), {"step": 1})
        with pytest.raises(OSError):
            checkpointer.finish() if by == "finish" else checkpointer.save(2, tensors(2), {"step": 2})
    checkpointer.finish()
    assert list(checkpointer.folder.iterdir()) == []
    checkpointer.save(3, tensors(3), {"step": 3})
    checkpointer.finish()
    assert checkpointer.steps() == [3]


@pytest.mark.parametrize(
    "wanted",
    [{"student": {"weight": torch.zeros(5, 3)}}, {"student": {"other": torch.zeros(4, 3)}}],
    ids=["shape", "name"],
)
def test_tensors_that_do_not_fit(tmp_path: Path, wanted: dict):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, tensors(1), {})
    with pytest.raises(ValueError, match="does not fit this model"):
        checkpointer.load(1, wanted)


@pytest.mark.parametrize("callable_", [Path.touch, print, getattr], ids=lambda c: c.__name__)
def test_metadata_that_names_code_is_refused(tmp_path: Path, callable_):
    class Doctored:
        def __reduce__(self):
            return (callable_, (tmp_path / "ran", "touch"))

    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, tensors(1), {})
    (checkpointer.path(1) / ".metadata").write_bytes(pickle.dumps(Doctored()))
    with pytest.raises(ValueError, match="not checkpoint data"):
        checkpointer.load(1, tensors(0))
    assert not (tmp_path / "ran").exists()


def sharded_linear() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    if dist.is_initialized():
        fp32 = torch.float32
        shard(module, list(module), device=torch.device("cpu"), strategy="FULL_SHARD", param_dtype=fp32,
              reduce_dtype=fp32)  # fmt: skip
    return module


def save_on(rank: int, folder: Path) -> dict:
    module = sharded_linear()
    Checkpointer(folder, keep=1).save(3, {"model": module.state_dict()}, {"step": 3})
    return full_state_dict(module)


def load_on(rank: int, folder: Path) -> dict:
    module = sharded_linear()
    nn.init.zeros_(module[0].weight)
    Checkpointer(folder, keep=1).load(3, {"model": module.state_dict()})
    return full_state_dict(module)


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2)])
def test_any_number_of_ranks_reads_what_another_saved(tmp_path: Path, saving: int, loading: int):
    def on(fn: Callable[[int, Path], dict], ranks: int) -> dict:
        return run_ranks(fn, tmp_path)[0] if ranks == 2 else fn(0, tmp_path)

    saved, loaded = on(save_on, saving), on(load_on, loading)
    assert saved.keys() == loaded.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert len(list((tmp_path / "checkpoints/step_0000003").glob("*.distcp"))) == saving


def broadcast_on(rank: int) -> dict:
    module = sharded_linear()
    whole = {"0.weight": torch.arange(30.0).view(5, 6), "0.bias": torch.ones(5), "1.weight": torch.ones(3, 5),
             "1.bias": torch.zeros(3)}  # fmt: skip
    load_full_state_dict(module, whole if rank == 0 else {})
    return full_state_dict(module)


def test_rank_zeros_weights_reach_every_shard():
    first, second = run_ranks(broadcast_on)
    assert torch.equal(first["0.weight"], torch.arange(30.0).view(5, 6))
    assert second == {}
