"""Runs of a sweep as processes of the training command, one after another, or as tasks of a Slurm array."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dinov2.configs import Config, public_config
from dinov2.sweep.plan import Run, Sweep
from dinov2.train.state import changes, check_resumable
from dinov2.utils.cli import DONE, Stopped, Terminated
from dinov2.utils.files import write_json
from dinov2.utils.signals import STATUS_OF, receive_when_parent_dies

logger = logging.getLogger("sweep")

FINISHED = "sweep_run.json"
"""File in a run's folder, written once its training is complete: seconds, processes and configuration."""

_ROOT = Path(__file__).parents[2]
_TRAIN = _ROOT / "dinov2" / "train" / "train.py"
_RESTARTS = 3  # of all processes, where one was lost
# Keys that a finished run does not depend on.
_INDIFFERENT = re.compile(
    r"(logging|performance|debug)\..*|online\.cache_dir|data\.(outage_minutes|memory_gib|slide_root)"
    r"|train\.(allow_changes|async_checkpoints|checkpoint_period_iterations|hang_timeout|keep_checkpoints(_every)?"
    r"|num_workers|on_collapse|output_dir|prefetch_factor|skip_checkpointer|start_timeout|time_limit)"
)


def is_finished(sweep: Sweep, run: Run) -> bool:
    """Whether a run's training is complete."""
    return (sweep.output / run.name / FINISHED).exists()


def command(sweep: Sweep, run: Run, processes: int = 1, *flags: str) -> list[str]:
    """Command line of a run: the training command, under torchrun for several processes."""
    launcher: list[str] = []
    if processes > 1:
        script = _ROOT / "scripts" / "_torchrun.py"  # which an installed package lacks
        torchrun = [str(script)] if script.exists() else ["-m", "torch.distributed.run"]
        launcher = [*torchrun, "--standalone", f"--nproc_per_node={processes}", f"--max-restarts={_RESTARTS}"]
    place = ["--config-file", sweep.base, "--output-dir", str(sweep.output / run.name)]
    return [sys.executable, *launcher, str(_TRAIN), *place, *flags, *run.overrides]


def check_begun(sweep: Sweep, processes: int) -> None:
    """Refuse a sweep that has changed what runs were made with.

    Raises ValueError if a finished run would now be another one, or an interrupted one cannot go on as it would be, see
    `check_resumable`.
    """
    for run, config in zip(sweep.runs, sweep.configs, strict=True):
        folder = sweep.output / run.name
        if is_finished(sweep, run):
            _check_finished(folder, run, config, processes)
        elif saved := _newest_state(folder):
            try:
                check_resumable(saved, config)
            except ValueError as error:
                raise ValueError(f"{run.name} in '{sweep.output}' does not fit the sweep any more. {error}") from error


def _check_finished(folder: Path, run: Run, config: Config, processes: int) -> None:
    saved = json.loads((folder / FINISHED).read_text())
    told = changes(saved["config"], config)
    if run.follows:
        told.pop("MODEL.WEIGHTS", None)  # the folder of the run before, which may have moved with this one
    differing = [change for key, change in told.items() if not _INDIFFERENT.fullmatch(key)]
    if saved["processes"] != processes:
        differing.append(f"--processes was {saved['processes']} and is now {processes}")
    if differing:
        raise ValueError(
            f"'{folder}' is a finished run of another sweep ({'; '.join(differing)}); restore that, give another "
            "--output, or move the folder away to train it anew."
        )


def _newest_state(folder: Path) -> dict[str, Any] | None:
    for path in sorted(folder.glob("checkpoints/step_*/state.json"), reverse=True):
        with suppress(FileNotFoundError, ValueError):
            return json.loads(path.read_text())
    return None


def check_data(sweep: Sweep, processes: int) -> None:
    """Let the training command check data, weights and plan of each run that has not begun; for one seed of each.

    A phase that follows another one is checked without the weights that are not there yet. Raises ValueError, after the
    command has said what is wrong.
    """
    seen = set()
    for run in sweep.runs:
        folder = sweep.output / run.name
        if run.group in seen or is_finished(sweep, run) or _newest_state(folder):
            continue
        seen.add(run.group)
        logger.info("Checking %s ...", run.group)
        weights = ("MODEL.WEIGHTS=",) if run.follows else ()
        line = [*command(sweep, run, 1, "--dry-run"), *weights]
        count = str(processes)
        if _run(line, stdout=subprocess.DEVNULL, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count) != DONE:
            raise ValueError(f"{run.group} cannot be trained as it is: {shlex.join(line)}")


def train(sweep: Sweep, runs: Iterable[Run], processes: int) -> dict[str, int]:
    """Train runs, or go on with them, one after another; those that are finished are passed over.

    Returns:
        Exit status of each run that failed, by its name, those that would have started from it included. Others are
        made all the same.

    Raises:
        Stopped: if a training stopped before its end as it was asked to, by ``train.time_limit`` for instance.
    """
    failed: dict[str, int] = {}
    for run in runs:
        number = f"Run {sweep.runs.index(run) + 1} of {len(sweep.runs)}, {run.name}"
        if is_finished(sweep, run):
            logger.info("%s, is finished.", number)
            continue
        if run.follows in failed:
            failed[run.name] = failed[run.follows]
            logger.error("%s, has no teacher to start from, since %s failed.", number, run.follows)
            continue
        line = command(sweep, run, processes)
        logger.info("%s: %s", number, shlex.join(line))
        begun = time.time()
        group = os.environ.get("WANDB_RUN_GROUP", sweep.output.name)
        # The launch is what train.time_limit counts from.
        status = _run(line, PATHFM_STARTED=str(int(begun)), WANDB_RUN_GROUP=group)
        if status in STATUS_OF.values():
            raise Stopped(f"{number}, has stopped before its end; the same command goes on from there.", status)
        if status == DONE:
            _record(sweep, run, processes, time.time() - begun)
        else:
            failed[run.name] = status
            logger.error("%s, failed with status %d; the next one is started.", number, status)
    return failed


def _run(line: Sequence[str], stdout: int | None = None, **variables: str) -> int:
    """Exit status of a command, to which a signal to this process is passed on; the signal's error follows its end."""
    process = subprocess.Popen(line, stdout=stdout, env=os.environ | variables, preexec_fn=receive_when_parent_dies)
    try:
        return process.wait()
    except (KeyboardInterrupt, Terminated) as asked:
        # A terminal, or Slurm, may have told it already, which it takes as one request.
        process.send_signal(asked.number if isinstance(asked, Terminated) else signal.SIGINT)
        process.wait()
        raise


def _record(sweep: Sweep, run: Run, processes: int, seconds: float) -> None:
    config = public_config(sweep.configs[sweep.runs.index(run)])
    record = {"config": config, "processes": processes, "seconds": round(seconds, 1)}
    write_json(sweep.output / run.name / FINISHED, record)


def slurm_script(sweep: Sweep, processes: int, arguments: Sequence[str]) -> str:
    """Script for sbatch: an array with a task for each variant and seed, which trains all its phases.

    ``arguments`` are those that this command has been given, without what asks for the script.
    """
    requeue = _ROOT / "scripts" / "_requeue.sh"
    again = f"{shlex.quote(str(requeue))} " if requeue.exists() else ""
    line = f"{shlex.quote(sys.executable)} -m dinov2.sweep {shlex.join(arguments)}"
    log = sweep.output / "slurm-%A_%a.out"
    return f"""#!/usr/bin/env bash
# {len(sweep.runs)} runs of the sweep {sweep.name}: each task trains a variant with one seed, phase after phase.
# Table and page, when all tasks are done: {line} --report
#SBATCH --job-name={sweep.name}
#SBATCH --array=0-{len(sweep.tasks) - 1}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
set -euo pipefail
cd {shlex.quote(os.getcwd())}
export PYTHONPATH={shlex.quote(str(_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}
exec {again}{line} --task "$SLURM_ARRAY_TASK_ID"
"""
