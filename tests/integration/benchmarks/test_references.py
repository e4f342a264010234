"""The two reference steps compute what the trainer computes, and the gate between them sees errors."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import reference_packed, reference_separate
from benchmarks.gate import THRESHOLDS, GateResult, correctness
from benchmarks.reference_parts import EagerStep, StepSpec
from dinov2.configs import Config
from dinov2.train.run import build_arch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.optim import ScheduleValues, apply_schedule, build_optimizer
from dinov2.train.update.weight_update import WeightUpdate
from tests.helpers.batches import random_batch
from tests.helpers.training import CPU, tiny_config

REFERENCES = (reference_packed.ReferenceStep, reference_separate.ReferenceStep)
ARCHITECTURES = ((), ("student.ffn_layer=swiglufused", "ibot.separate_head=false"))
TEMP, LR, WD, MOMENTUM, CLIP = 0.05, 1e-3, 0.04, 0.9, 0.5


def spec_of(config: Config, **changes: Any) -> StepSpec:
    """The tiny configuration's step; its backbone is 128 wide with 4 blocks of 4 heads."""
    mlp = config.student.ffn_layer == "mlp"
    return replace(
        StepSpec(
            embed_dim=128,
            depth=4,
            heads=4,
            ffn=config.student.ffn_layer,
            ffn_dim=512 if mlp else 344,  # two thirds of 512, in eights
            patch=config.student.patch_size,
            registers=config.student.num_register_tokens,
            drop_path=0.0,
            global_size=config.crops.global_crops_size,
            local_size=config.crops.local_crops_size,
            local_crops=config.crops.local_crops_number,
            prototypes=config.dino.head_n_prototypes,
            ibot_prototypes=config.ibot.head_n_prototypes,
            head_hidden_dim=config.dino.head_hidden_dim,
            head_layers=config.dino.head_nlayers,
            dino_bottleneck=config.dino.head_bottleneck_dim,
            ibot_bottleneck=config.ibot.head_bottleneck_dim,
            separate_ibot_head=config.ibot.separate_head,
            kde_weight=config.dino.kde_loss_weight,
            clip=CLIP,
            dtype="fp32",
        ),
        **changes,
    )


def problem(*overrides: str, dtype: torch.dtype = torch.float32) -> tuple[SSLMetaArch, StepSpec, dict[str, Tensor]]:
    """Our networks without stochastic depth, teacher unlike student, and a batch with padded mask rows."""
    plain = ("dino.koleo_loss_weight=0", "student.drop_path_rate=0", "optim.layerwise_decay=1")
    config = tiny_config(*plain, *overrides)
    arch = build_arch(config, CPU, from_checkpoint=False).to(dtype)
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = random_batch(config)
    batch |= {name: batch[name].to(dtype) for name in ("global_crops", "local_crops")}
    assert (batch["mask_weight"] == 0).any()
    return arch, spec_of(config), batch


def gradients(arch: SSLMetaArch) -> dict[str, Tensor]:
    return {name: p.grad for name, p in arch.student.named_parameters() if p.grad is not None}


def make(reference: type, arch: SSLMetaArch, spec: StepSpec, **switches: Any) -> EagerStep:
    return reference(spec, arch.student.state_dict(), arch.teacher.state_dict(), CPU, **switches)


def gate_against(arch: SSLMetaArch, step: EagerStep, batch: dict[str, Tensor], **limits: float) -> GateResult:
    """Losses and gradients of ``step`` against our trainer's."""
    arch.student.zero_grad()
    expected = arch.compute_losses(batch, TEMP)
    expected["total_loss"].backward()
    losses = step.losses(batch, TEMP)
    losses["total_loss"].backward()
    return correctness(losses, step.named_gradients(), expected, gradients(arch), **limits)


def test_references_share_no_code_with_the_library():
    found = set()
    for path in Path(reference_packed.__file__).parent.glob("reference_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module if node.module.startswith("benchmarks") else node.module.partition(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "benchmarks.reference_parts"}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("overrides", ARCHITECTURES, ids=["mlp-two-heads", "swiglu-shared-head"])
def test_losses_and_gradients_equal_ours(reference: type, overrides: tuple[str, ...]):
    arch, spec, batch = problem(*overrides, dtype=torch.float64)
    # Our KDE is rounded to float32.
    result = gate_against(
        arch,
        make(reference, arch, spec),
        batch,
        max_loss_error=1e-6,
        min_cosine=1 - 1e-12,
        max_norm_error=1e-6,
    )
    assert result.passed, result.failures


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_gradient_equals_ours_in_float32(reference: type):
    arch, spec, batch = problem()
    step = make(reference, arch, spec)
    assert gate_against(arch, step, batch).passed
    found, expected = step.named_gradients(), gradients(arch)
    assert found.keys() == expected.keys() == dict(arch.student.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("reference", REFERENCES)
def test_two_whole_steps_equal_ours(reference: type):
    arch, spec, batch = problem(dtype=torch.float64)
    step = make(reference, arch, spec)
    optimizer = build_optimizer(arch.get_params_groups(), (0.9, 0.999))
    update = WeightUpdate(optimizer, arch.student, arch.teacher, CLIP)
    values = ScheduleValues(lr=LR, last_layer_lr=LR, wd=WD, mom=MOMENTUM, teacher_temp=TEMP)
    for _ in range(2):
        apply_schedule(optimizer, values)
        optimizer.zero_grad()
        losses = arch.compute_losses(batch, TEMP)
        losses["total_loss"].backward()
        norms = update.grad_norms()
        assert all(norm > CLIP for norm in norms.values())
        update.apply(MOMENTUM, torch.ones(()))
        found = step.step(batch, LR, WD, MOMENTUM, TEMP)
        assert found.keys() == losses.keys()
        for name, loss in losses.items():
            assert float(found[name]) == pytest.approx(loss.item(), rel=1e-6), name
    for ours, theirs in ((arch.student, step.student), (arch.teacher, step.teacher)):
        torch.testing.assert_close(dict(theirs.state_dict()), dict(ours.state_dict()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("reference", "switches"),
    [
        (reference_packed.ReferenceStep, {"half_stream": True}),
        (reference_packed.ReferenceStep, {"half_stream": False}),
        (reference_separate.ReferenceStep, {}),
    ],
)
def test_bf16_is_close_to_float32(reference: type, switches: dict[str, bool]):
    arch, spec, batch = problem()
    step = make(reference, arch, replace(spec, dtype="bf16"), **switches)
    result = gate_against(arch, step, batch, **THRESHOLDS["bf16"])
    assert result.passed, result.failures
    assert not gate_against(arch, step, batch).passed  # it does compute in 16 bit


def test_fp16_with_its_scaler_steps_like_float32():
    arch, spec, batch = problem()
    start, name = arch.student.state_dict(), "dino_head.mlp.0.weight"
    moved = []
    for dtype in ("fp32", "fp16"):
        step = make(reference_packed.ReferenceStep, arch, replace(spec, dtype=dtype))
        for _ in range(12):  # the scaler begins too high, and makes no step until its scale fits
            step.step(batch, LR, WD, 1.0, TEMP)
            moved.append(step.student.state_dict()[name] - start[name])
            if moved[-1].any():
                break
    # Adam's first step is the sign of the gradient: rounding may turn the least ones.
    assert (moved[0].sign() == moved[-1].sign()).float().mean() > 0.98


def test_switches_change_cost_not_results():
    arch, spec, batch = problem()
    packed, separate = REFERENCES
    plain = make(packed, arch, spec).step(batch, LR, WD, MOMENTUM, TEMP)
    assert make(packed, arch, spec, host_isnan=True).step(batch, LR, WD, MOMENTUM, TEMP) == plain
    dropping = replace(spec, drop_path=0.4)
    steps = [make(separate, arch, dropping, checkpointing=on) for on in (False, True)]
    for step in steps:
        torch.manual_seed(3)
        step.losses(batch, TEMP)["total_loss"].backward()
    for name, gradient in steps[0].named_gradients().items():
        torch.testing.assert_close(steps[1].named_gradients()[name], gradient, msg=name)


def test_packed_stochastic_depth_keeps_a_fixed_number_of_images():
    crops = [torch.zeros(7, 3, 2), torch.zeros(5, 2, 2)]
    seen = []

    def branch(rows: Tensor, sizes: Any) -> Tensor:
        seen.append([tuple(size) for size in sizes])
        return torch.ones_like(rows)

    first, second = reference_packed.add_branch(crops, branch, 0.4)
    assert seen == [[(4, 3), (3, 2)]]  # int(7 * 0.6) and int(5 * 0.6) images
    for x, images, kept in ((first, 7, 4), (second, 5, 3)):
        expected = torch.tensor([0.0] * (images - kept) + [images / kept] * kept)
        for channel in x.flatten(1).T:
            torch.testing.assert_close(channel.sort().values, expected)


def test_separate_stochastic_depth_computes_all_images_and_scales_by_chance():
    factors = reference_separate.drop_path(torch.ones(4000, 3, 2), 0.4)
    assert torch.equal(factors, factors[:, :1, :1].expand_as(factors))
    torch.testing.assert_close(factors.unique(), torch.tensor([0, 1 / 0.6]))
    assert factors.mean().item() == pytest.approx(1, abs=0.05)  # four standard deviations
    arch, spec, _ = problem()
    step = make(reference_separate.ReferenceStep, arch, replace(spec, drop_path=0.3), linear=True)
    assert step.rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda grads, losses: grads["backbone.blocks.0.mlp.fc1.weight"].neg_(), "cosine of the gradients of backbone"),
        (lambda grads, losses: grads["ibot_head.mlp.0.weight"].mul_(1.1), "norm of ibot_head"),
        (lambda grads, losses: grads["dino_head.last_layer.weight_v"][0, 0].fill_(torch.nan), "of dino_head is nan"),
        (lambda grads, losses: losses["kde_loss"].data.mul_(1.01), "difference of kde_loss"),
    ],
    ids=["sign", "scale", "nan", "loss"],
)  # fmt: skip
def test_gate_fails_on_a_wrong_step(change: Any, phrase: str):
    arch, _, batch = problem()
    losses = arch.compute_losses(batch, TEMP)
    losses["total_loss"].backward()
    right = gradients(arch)
    assert correctness(losses, right, losses, right).passed
    wrong = {name: gradient.clone() for name, gradient in right.items()}
    wrong_losses = {name: loss.detach().clone() for name, loss in losses.items()}
    change(wrong, wrong_losses)
    result = correctness(wrong_losses, wrong, losses, right)
    assert not result.passed
    assert any(phrase in failure for failure in result.failures), result.failures
    assert json.loads(json.dumps(result.report()))["passed"] is False


def test_gate_by_hand():
    ours = {"a.x": torch.tensor([3.0, 0.0]), "a.y": torch.tensor([4.0])}
    ref = {"a.x": torch.tensor([0.0, 3.0]), "a.y": torch.tensor([4.0])}
    result = correctness({"l": 2.0}, ours, {"l": 4.0}, ref)
    assert result.loss_errors == {"l": 0.5}
    assert result.cosines == {"a": pytest.approx(16 / 25)}
    assert result.norm_errors == {"a": 0.0}
    assert (result.worst_parameter, result.worst_parameter_cosine) == ("a.x", 0.0)
    with pytest.raises(ValueError, match=r"\['a.y'\] are on one side only"):
        correctness({"l": 2.0}, ours, {"l": 4.0}, {"a.x": ref["a.x"]})


def test_a_batch_of_another_shape_is_refused():
    arch, spec, batch = problem()
    step = make(reference_packed.ReferenceStep, arch, replace(spec, local_crops=3))
    with pytest.raises(ValueError, match=r"local_crops is \(16, 3, 28, 28\); \(24, 3, 28, 28\) is expected"):
        step.losses(batch, TEMP)
