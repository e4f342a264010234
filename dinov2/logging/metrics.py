"""Metrics, accumulated on the device, and where their records go: the console, ``metrics.jsonl``, W&B."""

import json
import logging
import os
import secrets
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_size

logger = logging.getLogger("dinov2")

CHANCE, OF_CHANCE = "_chance", "_of_chance"
_PROBED = ("/balanced_accuracy", "/value")  # the headlines of probes with labels, and without


class MetricAccumulator:
    """Running means of 0-d device tensors; adding a step neither copies to the host nor synchronises."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's values; every step of a period has the same names."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if self._sum is None:
            self._names, self._sum = list(metrics), values
        else:
            assert list(metrics) == self._names, "metric names changed within a logging period"
            self._sum = self._sum + values
        self._count += 1

    def reduce(self) -> dict[str, float]:
        """Mean over the period's steps and ranks, then start anew: one all-reduce, one sync; all ranks must call."""
        if self._sum is None:
            return {}
        means = all_reduce_sum(self._sum) / (self._count * get_global_size())
        self._sum, self._count = None, 0
        return dict(zip(self._names, means.tolist(), strict=True))


def relative_to_chance(metrics: Mapping[str, float]) -> dict[str, float]:
    """Put ``<term>_of_chance``, a loss as a fraction of its level of chance, in place of the level, ``<loss>_chance``.

    They are fractions of means over a period, so that steps without masks count for nothing, and are left out where
    the level is 0.
    """
    found = dict(metrics)
    for name in metrics:
        loss = name.removesuffix(CHANCE)
        if loss != name and loss in metrics and (level := found.pop(name)) > 0:
            found[of_chance(loss)] = metrics[loss] / level
    return found


def of_chance(loss: str) -> str:
    """Name of the metric of a loss as a fraction of chance."""
    return loss.removesuffix("_loss") + OF_CHANCE


class Sink:
    """Receives one record per logging period, on rank 0 only."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush and release what is held."""


class ConsoleSink(Sink):
    """One line per record: step, losses, absolute and of chance, lr, gradient norm, speed, data, memory, time left."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's headline values, of a training step or of probes."""
        if "total_loss" not in record:
            shown = [f"{name} {value:.4f}" for name, value in record.items() if name.endswith(_PROBED)]
            logger.info("step %d  %s", record["step"], "  ".join(shown))
            return
        losses = "  ".join(
            f"{name.removesuffix('_loss').removesuffix('_crops')} {value:.4f}"
            + (f" ({record[of_chance(name)]:.1%} of chance)" if of_chance(name) in record else "")
            for name, value in record.items()
            if name.endswith("_loss")
        )
        slides = f"  {record['slides_per_batch']} slides" if "slides_per_batch" in record else ""
        norm = max(value for name, value in record.items() if name.startswith("grad_norm"))
        logger.info(
            "step %d/%d  %s  lr %.2e  grad norm %.2f  %.1f img/s  data wait %.0f%%%s  %.1f GiB  ETA %s",
            record["step"], record["total_steps"], losses, record["lr"], norm, record["img_per_s"],
            record["data_wait_pct"], slides, record["memory_gib"], timedelta(seconds=round(record["eta_s"])),
        )  # fmt: skip


class JsonlSink(Sink):
    """Appends each record as one JSON line. After a resume, the last line of a step is the valid one."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record; raises OSError where the file cannot be written."""
        try:
            self._file.write(json.dumps(dict(record)) + "\n")
        except OSError as error:
            raise OSError(f"Metrics {self._file.name!r} cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbSink(Sink):
    """A Weights & Biases run whose id is kept in the output folder, so that a resume continues it.

    Without a login (or network) the run is kept offline under the output folder; nothing is ever asked.
    """

    def __init__(self, output_dir: Path, project: str, config: Mapping[str, Any]):
        import wandb

        id_file = output_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "dir": str(output_dir), "project": project, "id": id_file.read_text().strip(), "resume": "allow",
            "config": dict(config), "name": output_dir.resolve().name,
        }  # fmt: skip
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        try:
            self._run = wandb.init(mode=mode, **options)
        except wandb.errors.CommError as error:
            logger.warning("Weights & Biases cannot be reached (%s); this run is logged offline.", error)
            self._run = wandb.init(mode="offline", **options)
        if os.environ.get("DINOV2_RUN_SCRIPT"):
            self._run.save(os.environ["DINOV2_RUN_SCRIPT"], policy="now")
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back to an earlier step

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record."""
        self._run.log(dict(record))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
