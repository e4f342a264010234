"""Checkpoints of two processes: verified by shares, set aside together, saved beside training, waited for by no one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.distributed import MainProcessError, gather_objects
from dinov2.fsdp import Checkpointer, full_state_dict, shard
from dinov2.utils import files
from tests.distributed.test_kill_and_resume import command, environment
from tests.helpers.checkpoints import CHECKSUMS, flip
from tests.helpers.runs import checkpoint_tensors, read_metrics, write_tissue_shards
from tests.helpers.spawn import run_ranks

STEPS, WIDTH = 6, 24


def network() -> nn.Module:
    torch.manual_seed(0)
    module, fp32 = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), torch.float32
    if dist.is_initialized():
        shard(module, list(module), device=torch.device("cpu"), strategy="FULL_SHARD", param_dtype=fp32,
              reduce_dtype=fp32)  # fmt: skip
    return module


def train(module: nn.Module, step: int) -> None:
    """A step whose collectives meet those of a save in the background."""
    images = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
    module(images).square().mean().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def a_mapping(written: object) -> dict:
    if not isinstance(written, dict):
        raise ValueError("not a mapping")
    return written


def weights(module: nn.Module, checkpointer: Checkpointer, step: int) -> dict[str, Tensor]:
    checkpointer.load(step, {"model": module.state_dict()})
    return full_state_dict(module)


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"trained": {}}
    module, checkpointer = network(), Checkpointer(folder / "run", keep=STEPS, background=True)
    for step in range(1, STEPS + 1):
        train(module, step)
        found["trained"][step] = full_state_dict(module)
        checkpointer.save(step, {"model": module.state_dict()}, {"step": step})
    checkpointer.finish()
    found["saved"] = {step: weights(module, checkpointer, step) for step in checkpointer.steps()}

    # One after the other the newest is damaged in another file, and the one before it is taken on both ranks.
    found["taken"] = []
    for name in ("__1_0.distcp", "__0_0.distcp", ".metadata", "state.json", CHECKSUMS):
        newest = checkpointer.path(checkpointer.steps()[-1])
        dist.barrier()
        if rank == 0:
            flip(newest / name, 8 * (newest / name).stat().st_size // 2)
        dist.barrier()
        found["taken"].append((checkpointer.newest(a_mapping)["step"], newest.exists()))
    found["restored"] = weights(module, checkpointer, 1)
    if rank == 0:
        shutil.copytree(checkpointer.path(1), folder / "intact")
        (checkpointer.path(1) / "__1_0.distcp").unlink()
    dist.barrier()
    try:
        checkpointer.newest(a_mapping)
    except (ValueError, MainProcessError) as error:
        found["none left"] = type(error).__name__

    # A disk that fills up on one rank only, where it writes and where it reads again.
    found["full"] = []
    for where in ("save", "checksum"):
        broken = Checkpointer(folder / where, keep=1, background=True)
        original = files.checksum, torch.distributed.checkpoint.FileSystemWriter.write_data
        if rank == 1:

            def full(*args: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            if where == "checksum":
                files.checksum = full
            else:
                torch.distributed.checkpoint.FileSystemWriter.write_data = full
        broken.save(1, {"model": module.state_dict()}, {"step": 1})
        try:
            broken.finish()
        except (OSError, MainProcessError) as error:
            found["full"].append(type(error).__name__)
        files.checksum, torch.distributed.checkpoint.FileSystemWriter.write_data = original
        dist.barrier()
        found["full"].append(sorted(path.name for path in broken.folder.iterdir()))
        dist.barrier()
        broken.save(2, {"model": module.state_dict()}, {"step": 2})
        broken.finish()
        found["full"].append(gather_objects(broken.steps()))
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_two, tmp_path_factory.mktemp("two"))


def test_saved_while_training_goes_on_is_what_the_step_had(of_ranks: list[dict[str, Any]]):
    trained, saved = of_ranks[0]["trained"], of_ranks[0]["saved"]
    assert trained.keys() == saved.keys() == set(range(1, STEPS + 1))
    for step, expected in trained.items():
        assert all(torch.equal(saved[step][key], value) for key, value in expected.items())
    assert not torch.equal(trained[1]["0.weight"], trained[2]["0.weight"])


def test_damage_that_one_rank_finds_is_told_to_all(of_ranks: list[dict[str, Any]]):
    for found in of_ranks:
        assert found["taken"] == [(step, False) for step in range(STEPS - 1, 0, -1)]
    expected = of_ranks[0]["trained"][1]
    assert all(torch.equal(of_ranks[0]["restored"][key], value) for key, value in expected.items())
    assert [found["none left"] for found in of_ranks] == ["ValueError", "MainProcessError"]


def test_a_disk_that_is_full_for_one_rank_ends_the_save_on_all(of_ranks: list[dict[str, Any]]):
    for found in of_ranks:
        failed, left, after = found["full"][:3]
        assert failed in ("OSError", "MainProcessError") and left == [] and after == [[2], [2]]
        failed, left, after = found["full"][3:]
        assert failed in ("OSError", "MainProcessError") and left == [] and after == [[2], [2]]
    assert of_ranks[0]["full"][0] == of_ranks[0]["full"][3] == "OSError"


def test_bit_equal_after_a_checkpoint_was_set_aside(tmp_path: Path):
    """Two processes; the shard of the second one of the newest checkpoint is damaged, and its steps are made again."""
    shards = write_tissue_shards(tmp_path / "shards")
    short, whole, parts = "optim.early_stop=1.5", tmp_path / "whole", tmp_path / "parts"

    def run(output_dir: Path, *overrides: str) -> str:
        line = [*command(output_dir, shards, 2), *overrides]
        return subprocess.run(
            line, env=os.environ | environment(), check=True, timeout=600, capture_output=True, text=True
        ).stderr

    period = "train.checkpoint_period_iterations=3"
    run(whole, short, period)
    run(parts, "optim.early_stop=1.25", period)  # checkpoints of steps 3 and 5
    (broken,) = (parts / "checkpoints/step_0000005").glob("__1_*.distcp")
    flip(broken, 4 * broken.stat().st_size)
    said = run(parts, short, period)
    assert f"Resumed from {parts / 'checkpoints/step_0000003'}" in said and "Traceback" not in said
    assert {path.name for path in (parts / "checkpoints").iterdir()} == {
        "step_0000003", "step_0000005.corrupt", "step_0000006"
    }  # fmt: skip
    expected, found = checkpoint_tensors(whole, 6), checkpoint_tensors(parts, 6)
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    losses = ({r["step"]: r["total_loss"] for r in read_metrics(folder)} for folder in (whole, parts))
    assert next(losses) == next(losses)
