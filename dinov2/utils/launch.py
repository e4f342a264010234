"""Processes that another launcher than torchrun has started: Slurm's srun is understood, others are refused."""

import os
import shutil
import subprocess
from collections.abc import MutableMapping

_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
_FIRST_PORT, _PORTS = 20_000, 10_000


def join_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of srun; does nothing under torchrun, nor where there is one process.

    The master is the step's first node, at a port that follows from the job's and the step's number; ``MASTER_ADDR``
    and ``MASTER_PORT`` go first. A task that sees one GPU alone uses that. ValueError where several processes were
    asked for and this one cannot find the others: it would train alone, as would each of them.
    """
    if "RANK" in environment:
        return
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in environment:
        environment |= _from_srun(environment, tasks)
        return
    for name in _COUNTS:
        if (count := environment.get(name, "1")).isdigit() and int(count) > 1:
            raise ValueError(
                f"{name} = {count}, but this process was started alone, or by a launcher that does not say where the "
                "others are; start by srun, torchrun --nproc_per_node N, or ./run_1node.sh, or unset the variable."
            )


def _from_srun(environment: MutableMapping[str, str], tasks: int) -> dict[str, str]:
    # As "4(x2),3": four on each of two nodes, then three; this task's node is the SLURM_NODEID-th.
    counts = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    here, local = counts[int(environment["SLURM_NODEID"])], environment["SLURM_LOCALID"]
    if here > 1 and len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        local = "0"  # Slurm has given each task a GPU of its own
    step = 97 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + step % _PORTS),
    }


def _first_node(nodes: str) -> str:
    if "[" not in nodes:
        return nodes.partition(",")[0]
    if shutil.which("scontrol") is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r} needs scontrol, which is not there; set MASTER_ADDR.")
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]
