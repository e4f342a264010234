"""Two gloo processes under FSDP2 equal one process on the joined batch, from loss to updated weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2.build.networks import with_teachers
from dinov2.configs import load_config
from dinov2.distributed import all_reduce_sum, get_global_size
from dinov2.train.performance.apply import build_training_step
from dinov2.train.performance.capabilities import resolve_performance
from dinov2.train.run import build_arch
from dinov2.train.update.optim import ScheduleValues, adam_state, build_optimizer
from tests.helpers.batches import random_batch
from tests.helpers.checkpoints import save_vit
from tests.helpers.runs import NARROW_DINOV3, TINY
from tests.helpers.spawn import run_ranks
from tests.helpers.toys import Discriminator
from tests.helpers.training import CPU, whole

IMAGES = 8
TERM = "tests.helpers.toys:Discriminator"
EXACT = ("student.drop_path_rate=0", "optim.clip_grad=0.5", "dino.kde_gather=true", "dino.koleo_gather=true",
         "train.streaming_dataset_path=unused")  # fmt: skip


def two_steps(rank: int, overrides: tuple[str, ...]) -> dict[str, Tensor]:
    """Losses, gradients, weights, moments and teacher of two optimiser steps, as whole tensors."""
    config = load_config(None, [*TINY, *EXACT, *(item for item in overrides if item != TERM)])
    if TERM in overrides:
        options = Discriminator.Options(weight=0.7, width=5)
        config = dataclasses.replace(config, losses={TERM: options})
    arch = build_arch(with_teachers(config), CPU, from_checkpoint=False)
    optimizer = build_optimizer(arch.get_params_groups(), (0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    performance = resolve_performance(config, CPU)
    step = build_training_step(arch, optimizer, scaler, performance, IMAGES)
    batches = [
        random_batch(config, IMAGES, rank, get_global_size(), IMAGES * part)
        for part in range(config.optim.accumulation_steps)
    ]
    values = ScheduleValues(lr=1e-3, last_layer_lr=1e-3, wd=0.04, mom=0.9, teacher_temp=0.05)
    seen: dict[str, Tensor] = {}
    for number in range(2):
        step.begin(number, values)
        losses, _ = step.accumulate(batches, values)
        if number == 0:
            seen |= {
                f"grad/{name}": whole(p.grad)
                for name, p in (*arch.student.named_parameters(), *arch.losses.named_parameters())
                if p.grad is not None
            }
        norms = step.update(number, losses, values)
        for name, loss in losses.items():
            seen[f"{number}/{name}"] = all_reduce_sum(loss.detach().clone()) / get_global_size()
        seen |= {f"{number}/norm/{name}": norm.clone() for name, norm in norms.items()}
    seen |= {f"student/{name}": whole(p) for name, p in arch.student.named_parameters()}
    seen |= {f"teacher/{name}": whole(p) for name, p in arch.teacher.named_parameters()}
    seen |= {f"frozen_teacher/{name}": whole(p) for name, p in arch.frozen_teachers.named_parameters()}
    seen |= {f"losses/{name}": whole(tensor) for name, tensor in arch.losses.state_dict().items()}
    for name, state in adam_state(arch.trained, optimizer).items():
        seen |= {f"adam/{name}/{key}": whole(value) for key, value in state.items()}
    return seen


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ibot.separate_head=false", "train.centering=centering", "train.unfreeze_last_n_blocks=1"),
        ("compute_precision.student.backbone.sharding_strategy=FULL_SHARD",
         "compute_precision.student.dino_head.sharding_strategy=NO_SHARD",
         "compute_precision.teacher.dino_head.sharding_strategy=NO_SHARD"),
        ("performance.compile=true", "debug.compile_backend=aot_eager", "performance.recompute=selective",
         "performance.prefetch_blocks=2"),
        (TERM,),
        ("student.arch=tests.helpers.toys:Patches", "optim.layerwise_decay=0.7", "train.unfreeze_last_n_blocks=1"),
        (*NARROW_DINOV3, "student.options.pos_embed_rope_rescale_coords=null",  # which ranks draw each for themselves
         "student.options.untie_cls_and_patch_norms=true"),
        ("losses.gram.it_load_ema_teacher=0", "losses.gram.update_frequency=1", "losses.gram.img_level=true",
         "losses.gram.weight=5"),
        ("optim.accumulation_steps=3", TERM, "performance.prefetch_blocks=2"),
        ("optim.accumulation_steps=2", "train.centering=centering", "train.unfreeze_last_n_blocks=1",
         "compute_precision.student.backbone.sharding_strategy=FULL_SHARD",
         "compute_precision.student.dino_head.sharding_strategy=NO_SHARD",
         "compute_precision.teacher.dino_head.sharding_strategy=NO_SHARD"),
    ],
    ids=["sinkhorn", "shared-head-centering-frozen-blocks", "other-sharding", "compiled", "term-with-weights",
         "own-backbone", "dinov3", "gram", "accumulation", "accumulation-other-sharding"],
)  # fmt: skip
def test_two_processes_equal_one(overrides: tuple[str, ...]):
    assert_two_equal_one(overrides)


def test_two_processes_that_distil_equal_one(tmp_path: Path):
    """The teacher is wider and deeper than the student, with smaller patches; its weights are rank 0's alone."""
    teacher = save_vit(tmp_path / "teacher.pth")
    assert_two_equal_one(("student.arch=vit_demo", f"losses.distillation.teacher={teacher}"))


def assert_two_equal_one(overrides: tuple[str, ...]):
    one = two_steps(0, overrides)
    first, second = run_ranks(two_steps, overrides)
    assert one.keys() == first.keys() == second.keys()
    for name, expected in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        # Adam divides by the root of the second moment, which lifts rounding in the smallest gradients.
        atol = 2e-5 if name.startswith(("student", "teacher", "frozen_teacher")) else 2e-6
        torch.testing.assert_close(first[name], expected, rtol=2e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def averaged_by_micro_batch(rank: int, strategy: str) -> list[set[str]]:
    """After each of two micro-batches of a step, modules whose gradients have been averaged over ranks."""
    keys = [f"compute_precision.{role}.backbone.sharding_strategy={strategy}" for role in ("student", "teacher")]
    config = load_config(None, [*TINY, *EXACT, *keys, "optim.accumulation_steps=2"])
    arch = build_arch(config, CPU, from_checkpoint=False)
    averaged = []
    for number in range(2):
        arch.begin_micro_batch(completes_step=number == 1)
        batch = random_batch(config, IMAGES, rank, get_global_size(), IMAGES * number)
        arch.compute_losses(batch, 0.05)["total_loss"].backward()
        # One that is not averaged yet lies beside a gathered weight, whole.
        gradients = {name: [p.grad for p in module.parameters()] for name, module in arch.student.items()}
        averaged.append({name for name, of in gradients.items() if any(isinstance(g, DTensor) for g in of)})
    return averaged


@pytest.mark.parametrize(("strategy", "early"), [("SHARD_GRAD_OP", set()), ("FULL_SHARD", {"backbone"})])
def test_gradients_are_averaged_over_processes_once_a_step(strategy: str, early: set[str]):
    """But where memory is what the sharding is for: whole gradients are then never held."""
    for before, after in run_ranks(averaged_by_micro_batch, strategy):
        assert before == early and after == {"backbone", "dino_head", "ibot_head"}
