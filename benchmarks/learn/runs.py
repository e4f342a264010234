"""Runs of a sweep: a recipe, its variants and peers, each trained for one budget in a folder of its own.

A run's folder holds ``build.json`` (what decides over the run), ``train/`` (the training's own folder), ``log.txt``
and, once the training is complete, ``finished.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import ROOT
from dinov2.configs import Config, load_config
from dinov2.models import build_model_from_cfg
from dinov2.train.run import Run as Training
from dinov2.utils.files import check_description, write_json

RECIPE = "recipe"
PEERS = ("lightly_train", "meta", "openmidnight", "nanopath")
_LOSS_RECORDS = 100
_RATE_STEPS = 10, 40


class Budget(NamedTuple):
    """How long each run trains: one of the two is given."""

    images: int | None = None
    core_minutes: float | None = None


class Usage(NamedTuple):
    """Seconds of a command and of the processes that it waited for."""

    cpu: float
    wall: float


class Commands:
    """Commands that run side by side and end with this process."""

    def __init__(self) -> None:
        self._lock, self._running, self._closed = threading.Lock(), set(), False

    def run(self, command: Sequence[str], log: Path, cwd: Path | None = None) -> Usage:
        """Run a command with one thread and no GPU, beside its log, to which its output is added; what it took.

        Raises:
            ValueError: if it fails.
        """
        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
        start = time.perf_counter()
        with log.open("a") as file, self._lock:
            if self._closed:
                raise ValueError("The sweep is ending.")
            env, cwd = os.environ | alone, cwd or log.parent
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd)
            self._running.add(process)
        # wait4 alone tells the CPU time of one child, data workers included, while others run beside it.
        _, status, used = os.wait4(process.pid, 0)
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(process)
        if process.returncode:
            raise ValueError(f"A command ended with status {process.returncode}; its output is in '{log}'.")
        return Usage(used.ru_utime + used.ru_stime, time.perf_counter() - start)

    def close(self) -> None:
        """End what runs, and start nothing any more."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.terminate()


@dataclass(frozen=True)
class Model:
    """What is trained, once for each seed."""

    name: str
    overrides: tuple[str, ...] = ()
    peer: str = ""  # whose code trains it; empty: ours


@dataclass(frozen=True)
class Run:
    """One training."""

    model: Model
    seed: int
    folder: Path
    config: Config  # of the recipe, which says how large the network, the crops and the batch are
    command: tuple[str, ...]
    images: int
    spec: dict[str, Any] = field(default_factory=dict)  # what a peer's adapter is told

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of a complete training."""
        path = self.folder / "finished.json"
        return json.loads(path.read_text()) if path.exists() else None

    def prepare(self) -> None:
        """Make the folder, and the random start where it is ours.

        Raises:
            FileExistsError: if the folder holds another run.
        """
        described = json.dumps(asdict(self.config), sort_keys=True, default=str)
        build = {
            "images": self.images,
            "command": list(self.command),
            "configuration": hashlib.sha256(described.encode()).hexdigest()[:16],
            "spec": self.spec,
        }
        path = self.folder / "build.json"
        if not check_description(path, build):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"build": build})
        if not self.model.peer and not self.exports[0][1].exists():
            start = Training(self.config, self.folder / "start", torch.device("cpu"))
            start.export_teacher(start.state)

    def train(self, commands: Commands) -> None:
        """Train, or go on with an interrupted training, unless that is done."""
        if self.finished:
            return
        attempts = self.folder / "attempts.json"  # seconds of each; null: interrupted, so nobody knows
        earlier = json.loads(attempts.read_text()) if attempts.exists() else []
        write_json(attempts, [*earlier, None])
        if self.model.peer:
            write_json(self.folder / "spec.json", self.spec)
        used = commands.run(self.command, self.folder / "log.txt")
        known = None not in earlier
        write_json(attempts, [*earlier, used.cpu])
        record = {"images": self.images, "cpu_s": used.cpu if known else None, "wall_s": used.wall if known else None}
        write_json(self.folder / "finished.json", record | {"losses": self._losses()})

    @property
    def exports(self) -> list[tuple[int, Path]]:
        """Images seen and file of each teacher, from the random start to the end."""
        if self.model.peer:
            return [(images, self.folder / "train" / f"{images}.pth") for images in self.spec["exports"]]
        batch = self.config.train.batch_size_per_gpu
        steps, period = self.images // batch, self.config.evaluation.eval_period_iterations
        marks = [*range(period, steps, period), steps]
        start = (0, self.folder / "start" / "eval" / "training_0" / "teacher_checkpoint.pth")
        folder = self.folder / "train" / "eval"
        return [start, *((step * batch, folder / f"training_{step}" / "teacher_checkpoint.pth") for step in marks)]

    def _losses(self) -> list[dict[str, float]]:
        """Images and losses over time, thinned out; none of a peer, whose losses are of other things."""
        if self.model.peer:
            return []
        batch = self.config.train.batch_size_per_gpu
        lines = (self.folder / "train" / "metrics.jsonl").read_text().splitlines()
        # After a resume the last line of a step is the valid one.
        records = list({record["step"]: record for record in map(json.loads, lines)}.values())
        kept = records[:: math.ceil(len(records) / _LOSS_RECORDS)]
        return [
            {"images": record["step"] * batch} | {key: record[key] for key in record if key.endswith("_loss")}
            for record in kept
        ]


@dataclass(frozen=True)
class Sweep:
    """What the runs of a sweep share."""

    config_file: str
    tiles: Path  # that are trained on
    output: Path
    peer_root: Path
    exports: int = 5  # teachers over time, the one at the end among them
    overrides: tuple[str, ...] = ()  # of the configuration file

    def run(self, model: Model, seed: int, images: int, folder: Path | None = None) -> Run:
        """A run of about so many images, whose schedules end with it.

        Raises:
            ValueError: if the configuration has faults, or leaves the batch to the GPU.
        """
        # Without the colon of NAME:label, which peers take into names of runs that must have none.
        folder = (folder or self.output / "runs" / f"{model.name.replace(':', '-')}-seed{seed}").resolve()
        own = self.keys(model)
        data = (f"data.path={self.tiles}", "data.kind=parquet", f"train.seed={seed}", "logging.wandb=false")
        recipe, batch = load_config(self.config_file, [*own, *data]), self.batch(model)
        steps = max(self.exports, round(images / batch))
        # Warm-ups are told in epochs: epochs shrink or grow with the budget, their number stays.
        epoch = max(1, round(steps / recipe.optim.epochs))
        period = math.ceil(steps / self.exports)
        overrides = (
            *own,
            *data,
            f"train.OFFICIAL_EPOCH_LENGTH={epoch}",
            f"optim.epochs={steps / epoch}",
            "optim.early_stop=null",
            f"evaluation.eval_period_iterations={period}",
            f"train.checkpoint_period_iterations={period}",
        )
        config = load_config(self.config_file, overrides)
        if model.peer:
            adapter = Path(__file__).parent / "adapters" / f"run_{model.peer}.py"
            command = (str(self.peer_root / "venv" / "bin" / "python"), str(adapter), "spec.json")
            spec = peer_spec(config, self, model, steps, period)
        else:
            train = str(ROOT / "dinov2" / "train" / "train.py")
            file = str(Path(self.config_file).resolve())
            command = (sys.executable, train, "--config-file", file, "--output-dir", "train", *overrides)
            spec = {}
        return Run(model, seed, folder, config, command, steps * batch, spec)

    def keys(self, model: Model) -> tuple[str, ...]:
        """What a model changes in the configuration file; the keys of a peer are for its own code."""
        return self.overrides if model.peer else (*self.overrides, *model.overrides)

    def batch(self, model: Model) -> int:
        """Images per step; peers take the recipe's. Raises ValueError where it is left to the GPU."""
        batch = load_config(self.config_file, self.keys(model)).train.batch_size_per_gpu
        if batch == "auto":
            raise ValueError("train.batch_size_per_gpu is auto, but a budget in images needs a number.")
        return batch

    def seconds_per_image(self, model: Model, commands: Commands) -> float:
        """CPU seconds of an image, from what a longer run takes more than a short one; measured once."""
        path = self.output / "rates" / f"{model.name}.json"
        if not path.exists():
            used, batch = [], self.batch(model)
            for steps in _RATE_STEPS:
                run = self.run(model, 0, steps * batch, path.parent / f"{model.name}-{steps}")
                run.prepare()
                run.train(commands)
                used.append((run.images, run.finished["cpu_s"]))
            (few, short), (many, long) = used
            if None in (short, long) or long <= short:
                raise ValueError(f"The rate of {model.name} was not measured; remove '{path.parent}' and try again.")
            write_json(path, (long - short) / (many - few))
        return json.loads(path.read_text())


def peer_spec(config: Config, sweep: Sweep, model: Model, steps: int, period: int) -> dict[str, Any]:
    """What a peer has to share with us to be compared: tiles, budget, seed, network, crops and size of the heads."""
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(config, only_teacher=True)
    batch = config.train.batch_size_per_gpu
    marks = [0, *range(period, steps, period), steps]
    return {
        "root": str(sweep.peer_root),
        "tiles": str(sweep.tiles),
        "output": "train",
        "seed": config.train.seed,
        "steps": steps,
        "batch_size": batch,
        "num_workers": config.train.num_workers,
        "bf16": config.compute_precision.student.backbone.mixed_precision.param_dtype == "bf16",
        "exports": [step * batch for step in marks],
        "attention_backend": config.student.attention_backend,
        "architecture": backbone.describe(),
        "network": {
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "num_heads": backbone.num_heads,
            "patch_size": backbone.patch_size,
            "registers": config.student.num_register_tokens,
            "layerscale": config.student.layerscale,
            "drop_path_rate": config.student.drop_path_rate,
        },
        "crops": asdict(config.crops),
        "head": asdict(config.dino),
        "overrides": list(model.overrides),
    }
