"""Checkpoint folders: atomic, retained, read on any number of ranks, never trusted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dinov2.fsdp import Checkpointer, full_state_dict, load_full_state_dict, shard
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
    assert checkpointer.read_state(20) == {"step": 20}
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
    checkpointer.save(7, tensors(7), {})
    assert checkpointer.steps() == [7] and not half.exists()


def test_users_files_beside_checkpoints_stay(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for name in ("notes", "step_best", "step_0000001_mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {})
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"notes", "step_best", "step_0000001_mine", "step_0000002"}


def test_state_that_is_not_json(tmp_path: Path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, tensors(1), {})
    (checkpointer.path(1) / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"step_0000001/state.json' is not JSON"):
        checkpointer.read_state(1)


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
