"""Launchers other than torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.utils.launch import join_launch

# As srun sets them for the sixth of seven tasks on two nodes.
SRUN = {
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "n7,n9",
}  # fmt: skip


def joined(**changes: str) -> dict[str, str]:
    """What is set beside what was there."""
    environment = SRUN | changes
    join_launch(environment)
    return {name: value for name, value in environment.items() if name not in SRUN | changes}


def test_tasks_of_srun_know_their_ranks_and_where_to_meet():
    found = joined()
    assert 1024 < int(found.pop("MASTER_PORT")) < 65536
    ranks = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "n7"}
    assert found == ranks
    ports = [joined(**change)["MASTER_PORT"] for change in ({}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "1"})]
    assert ports[0] == ports[1] != ports[2]
    assert joined(SLURM_STEP_TASKS_PER_NODE="2(x2),3", SLURM_NODEID="2")["LOCAL_WORLD_SIZE"] == "3"


def test_a_task_with_a_gpu_of_its_own_takes_that():
    assert joined(CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"
    assert joined(CUDA_VISIBLE_DEVICES="0,1,2")["LOCAL_RANK"] == "1"


def test_what_the_user_says_goes_first():
    found = joined(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert not found.keys() & {"MASTER_ADDR", "MASTER_PORT"}
    assert joined(RANK="0") == {}


def test_lists_of_nodes_are_slurm_s_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        joined(SLURM_STEP_NODELIST="n[7,9]")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n7\necho n9\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert joined(SLURM_STEP_NODELIST="n[7,9]")["MASTER_ADDR"] == "n7"


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_none_of_several_processes_trains_alone(name: str):
    with pytest.raises(ValueError, match=f"{name} = 8.*srun"):
        join_launch({name: "8"})
    alone = {name: "1"}
    join_launch(alone)
    assert alone == {name: "1"}


def test_two_tasks_meet():
    code = """
import torch.distributed as dist
from dinov2.utils.launch import join_launch
join_launch()
dist.init_process_group("gloo")
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, dist.get_rank())
print(ranks)
dist.destroy_process_group()
"""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | SRUN | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert [task.communicate(timeout=300)[0] for task in tasks] == ["[0, 1]\n"] * 2
