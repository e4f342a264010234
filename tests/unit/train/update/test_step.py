"""The whole step: every switch of section ``performance`` leaves it what it is, and none waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.train.performance.apply import accelerate, build_training_step
from dinov2.train.performance.capabilities import ResolvedPerformance
from dinov2.train.run import build_arch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.guard import FiniteGuard
from dinov2.train.update.optim import ScheduleValues, build_optimizer
from dinov2.train.update.step import TrainingStep
from tests.helpers.batches import random_batch
from tests.helpers.training import CPU, in_precision, tiny_config

VALUES = ScheduleValues(lr=1e-3, last_layer_lr=1e-3, wd=0.04, mom=0.9, teacher_temp=0.05)
EAGER = ResolvedPerformance(compile=False, fused_update=False)
OFF = tuple(
    f"performance.{switch}=false"
    for switch in ("packed_crops", "inverse_gather", "factored_targets", "prune_last_block", "weight_copies")
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_step(*overrides: str, performance: ResolvedPerformance = EAGER) -> TrainingStep:
    config = tiny_config("student.ffn_layer=swiglufused", *overrides)
    arch = build_arch(config, CPU, from_checkpoint=False)
    optimizer = build_optimizer(arch.get_params_groups(), (0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return build_training_step(arch, optimizer, scaler, performance, global_batch=8)


def after_two_steps(step: TrainingStep) -> dict[str, Tensor]:
    """Losses and norms of two steps, and all weights after them."""
    seen = {}
    for number in range(2):
        metrics = step(number, [random_batch(step.arch.cfg, first_index=8 * number)], VALUES)
        seen |= {f"{number}/{name}": value.detach().clone() for name, value in metrics.items()}
    return seen | {name: value.clone() for name, value in step.arch.state_dict().items()}


def losses_and_gradients(*overrides: str) -> dict[str, Tensor]:
    """In float64, which leaves rounding no room to hide a difference."""
    torch.manual_seed(0)
    arch = SSLMetaArch(tiny_config("student.ffn_layer=swiglufused", *overrides)).double().train()
    accelerate(arch, compile=False)
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    batch = random_batch(arch.cfg, images=4)
    batch |= {name: batch[name].double() for name in ("global_crops", "local_crops")}
    torch.manual_seed(1)
    losses = arch.compute_losses(batch, 0.05)
    losses["total_loss"].backward()
    return losses | {name: p.grad for name, p in arch.student.named_parameters() if p.grad is not None}


# Separate passes draw other images to keep, so both sides of that comparison keep all.
@pytest.mark.parametrize(
    "overrides",
    [
        ("debug.inverse_gather=false",),
        ("debug.factored_targets=false",),
        ("debug.prune_last_block=false",),
        ("performance.recompute=selective",),
        ("performance.recompute=full",),
        ("student.attention_backend=math",),
        ("debug.packed_crops=false", "student.drop_path_rate=0"),
        (*OFF, "student.drop_path_rate=0", "train.centering=centering", "ibot.separate_head=false"),
    ],
    ids=lambda overrides: overrides[0].split(".")[1] if len(overrides) < 3 else "all-off",
)
def test_a_switch_changes_no_loss_and_no_gradient(overrides: tuple[str, ...]):
    kept = tuple(item for item in overrides if not item.startswith(("performance", "student.attention")))
    expected, found = losses_and_gradients(*kept), losses_and_gradients(*overrides)
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, value in expected.items():
        # KDE, KoLeo and the masks' weights are float32.
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_weight_copies_follow_the_weights():
    """In 16 bit, where they are kept, the copies of one process are those weights rounded, step after step."""
    step = make_step(*in_precision("bf16"))
    with_copies = after_two_steps(step)
    pairs = step.weight_update.low_precision
    assert len(pairs) == 2 * 4 * 4  # networks, blocks, linear maps
    assert all(torch.equal(weight.bfloat16(), copy) for weight, copy in pairs)
    cast = after_two_steps(make_step(*in_precision("bf16"), "debug.weight_copies=false"))
    for name in ("0/total_loss", "1/total_loss"):
        torch.testing.assert_close(with_copies[name], cast[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_step_equals_the_eager_one(dtype: str):
    compiled = ResolvedPerformance(compile=True, fused_update=False)
    overrides = (*in_precision(dtype), "debug.compile_backend=aot_eager")
    expected, found = (after_two_steps(make_step(*overrides, performance=p)) for p in (EAGER, compiled))
    if dtype == "fp32":
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    else:
        torch.testing.assert_close(found["1/total_loss"], expected["1/total_loss"], rtol=2e-3, atol=0)


def test_inductor_step_equals_the_eager_one():
    compiled = ResolvedPerformance(compile=True, fused_update=False)
    expected, found = (after_two_steps(make_step(performance=p)) for p in (EAGER, compiled))
    for name, value in expected.items():
        # Adam divides by the root of the second moment, which lifts rounding in the smallest gradients.
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error < (1e-4 if name[0] in "01" else 2e-3), (name, error)


@pytest.mark.parametrize(("uniform", "student_graphs"), [("true", 2), ("false", 4)])
def test_all_blocks_share_their_graphs(monkeypatch: pytest.MonkeyPatch, uniform: str, student_graphs: int):
    """Equal rates: one graph for all blocks and one for the pruned last. Linear rates: one per block. Teacher: two."""
    counters: dict[str, CompileCounterWithBackend] = {}
    plain = torch.compile

    def counting(function, backend, **options):
        counter = counters.setdefault(_name(function), CompileCounterWithBackend("eager"))
        return plain(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", counting)
    compiled = ResolvedPerformance(compile=True, fused_update=False)
    step = make_step("student.drop_path_rate=0.4", f"student.drop_path_uniform={uniform}", performance=compiled)
    after_two_steps(step)
    assert counters["Block.forward"].frame_count == student_graphs + 2


def _name(function) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


@pytest.mark.parametrize("overrides", [(), OFF, ("train.centering=centering",)], ids=["on", "off", "centering"])
def test_nothing_waits_for_the_device(overrides: tuple[str, ...]):
    """Fake tensors hold no values: reading one, for a shape, a branch or a record, raises."""
    step = make_step(*in_precision("bf16"), *overrides)
    step.guard = FiniteGuard(step.arch.device, 8, delay=3)  # as on a GPU
    step.arch.measures_health = True
    batch = random_batch(step.arch.cfg)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = {name: mode.from_tensor(v) for name, v in batch.items() if isinstance(v, Tensor)}
        for number in range(2):
            metrics = step(number, [batch], VALUES)
        assert all(value.shape == () for value in (metrics | step.arch.health).values())
        assert len(step.arch.health) == 4
