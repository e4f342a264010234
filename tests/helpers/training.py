"""A trainer over random batches, for tests of the loop itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2.configs import Config, load_config
from dinov2.distributed import get_global_rank, get_global_size
from dinov2.train.performance.apply import build_training_step
from dinov2.train.performance.capabilities import resolve_performance
from dinov2.train.plan.plan import make_plan
from dinov2.train.run import build_arch
from dinov2.train.state import TrainState
from dinov2.train.trainer import Trainer
from dinov2.train.update.optim import Schedules, adam_state, build_optimizer
from tests.helpers.batches import random_batch
from tests.helpers.runs import TINY

CPU = torch.device("cpu")
GLOBAL_BATCH = 8


def tiny_config(*overrides: str) -> Config:
    return load_config(None, [*TINY, "train.streaming_dataset_path=unused", *overrides])


def in_precision(name: str) -> tuple[str, ...]:
    """Overrides that compute everything in ``name`` (bf16 or fp16)."""
    return tuple(item.replace("fp32", name) for item in TINY if item.endswith("param_dtype=fp32"))


def random_batches(config: Config, first_step: int, steps: int) -> list[dict[str, Any]]:
    """This rank's batches of the steps from ``first_step`` on."""
    rank, world = get_global_rank(), get_global_size()
    return [
        random_batch(config, GLOBAL_BATCH, rank, world, GLOBAL_BATCH * step)
        for step in range(first_step, first_step + steps)
    ]


def make_trainer(
    config: Config,
    *,
    batches: Iterable[dict[str, Any]] | None = None,
    state: TrainState | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Trainer:
    """A trainer as `Run` builds it, on random images; ``options`` are the trainer's own."""
    plan = make_plan(config, get_global_size(), GLOBAL_BATCH)
    state = state or TrainState()
    arch = build_arch(config, CPU, from_checkpoint=False)
    if batches is None:
        batches = random_batches(config, state.step, plan.total_steps - state.step)
    optimizer = build_optimizer(arch.get_params_groups(), (config.optim.adamw_beta1, config.optim.adamw_beta2))
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    performance = resolve_performance(config, CPU)
    return Trainer(
        training_step=build_training_step(arch, optimizer, scaler, performance, plan.global_batch),
        schedules=Schedules(config, plan),
        plan=plan,
        state=state,
        batches=batches,
        **{"log_period": 1, **options},
    )


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights, centres and Adam moments by name, whole. All ranks must call."""
    arch, optimizer = trainer.training_step.arch, trainer.training_step.weight_update.optimizer
    found = dict(arch.state_dict())
    for name, moments in adam_state(arch.trained, optimizer).items():
        found |= {f"adam.{name}.{key}": value for key, value in moments.items()}
    return {name: whole(tensor) for name, tensor in found.items()}


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered where it is sharded. All ranks must call."""
    # Of a replicated tensor full_tensor returns the local one itself.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> Sequence[str]:
    """Names whose tensors are not bit-equal."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
