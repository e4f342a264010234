"""Targets left as Sinkhorn's factors: against the papers' formulas, compiled, in tiles, and in their memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.loss import (
    EAGER,
    Assignments,
    compiled_kernels,
    ibot_loss,
    prototype_kernels,
    sinkhorn,
    sinkhorn_assignments,
    sinkhorn_assignments_of,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from tests.helpers import loss_reference as reference
from tests.helpers.loss_reference import value_and_grad

TEMP, TAU, K = 0.04, 0.1, 12
# A gradient comes back in the student's dtype: that rounding is all that 16 bit may cost.
GRAD_RTOL = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def cosines(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


# Teacher logits of the rows that count, before rounding.
LOGITS: dict[str, Callable[[], Tensor]] = {
    "cosines": lambda: cosines(9, K),
    "one row": lambda: cosines(1, K),
    "no rows": lambda: cosines(0, K),
    "gains": lambda: cosines(9, K) * torch.linspace(0.3, 2.5, K, dtype=torch.float64),
    "beyond exp": lambda: cosines(K, K) + 22 * torch.eye(K, dtype=torch.float64),
    "wide": lambda: 5 * torch.randn(9, K, dtype=torch.float64),
    "unpopular prototypes": lambda: cosines(9, K) - torch.arange(K, dtype=torch.float64) * 40,
}


@pytest.mark.parametrize("dtype", GRAD_RTOL)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
def test_cross_entropy_equals_the_formulas(make, padding, dtype):
    real = make().to(dtype)
    targets = reference.sinkhorn_in_logs(real, TEMP, 3) if len(real) else real.double()
    targets = torch.cat([targets, targets.new_zeros(padding, K)])
    teacher = torch.cat([real, (50 * cosines(padding, K)).to(dtype)])
    weight = (torch.arange(len(teacher)) < len(real)).double()
    student, factor = cosines(*teacher.shape).to(dtype), torch.arange(1.0, len(teacher) + 1)

    expected = value_and_grad(lambda s: (reference.cross_entropy(targets, s, TAU) * factor).sum(), student.double())
    assigned = sinkhorn_assignments(teacher, TEMP, row_weight=weight)
    value, grad = value_and_grad(lambda s: (soft_cross_entropy(s, assigned, TAU) * factor).sum(), student)
    assert isinstance(assigned, Assignments)
    assert assigned.logits is teacher
    assert grad.dtype == dtype
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(value.double(), expected[0], rtol=rtol, atol=0)
    torch.testing.assert_close(grad.double(), expected[1], rtol=GRAD_RTOL[dtype], atol=max(rtol / 10, 1e-13))
    assert not grad[len(real) :].any()


@pytest.mark.parametrize("scale", [1e4, 6e4])
def test_extreme_logits(scale):
    student, teacher = (scale * cosines(6, K)).half(), (scale * torch.eye(6, K)).half()
    assigned = sinkhorn_assignments(teacher, TEMP)
    value, grad = value_and_grad(lambda s: soft_cross_entropy(s, assigned, TAU).sum(), student)
    expected, expected_grad = value_and_grad(
        lambda s: reference.cross_entropy(assigned.probs(), s, TAU).sum(), student.double()
    )
    torch.testing.assert_close(assigned.probs().sum(1), torch.ones(6))
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2**-10, atol=1e-6)


def test_ibot_takes_either_form():
    student, teacher, weight = cosines(8, K), cosines(8, K), torch.tensor([0.5] * 6 + [0.0] * 2)
    targets = reference.sinkhorn(teacher[:6], TEMP, 3)
    expected = value_and_grad(lambda s: (reference.cross_entropy(targets, s[:6], TAU) * 0.5).sum() / 4, student)
    assigned = sinkhorn_assignments(teacher, TEMP, row_weight=weight > 0)
    for target in (assigned, assigned.probs()):
        torch.testing.assert_close(
            value_and_grad(lambda s, t=target: ibot_loss(s, t, weight, 4, TAU), student),
            expected,
            rtol=1e-12,
            atol=1e-14,
        )


def test_several_matrices_share_their_collectives(monkeypatch):
    batches = [cosines(5, K), cosines(9, 7), cosines(0, K)]
    weights = [None, torch.arange(9) < 6, None]
    reduced = {"sum": [], "max": []}
    for name, sizes in reduced.items():
        monkeypatch.setattr(sinkhorn, f"all_reduce_{name}", lambda t, sizes=sizes: sizes.append(t.numel()) or t)
    together = sinkhorn_assignments_of(batches, TEMP, 4, weights)
    assert reduced == {"sum": [K + 7 + K] * 4, "max": [K + 7 + K]}
    expected = [reference.sinkhorn(batches[0], TEMP, 4), reference.sinkhorn(batches[1][:6], TEMP, 4)]
    torch.testing.assert_close(together[0].probs(), expected[0], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(together[1].probs()[:6], expected[1], rtol=1e-11, atol=1e-14)
    assert not together[1].probs()[6:].any()
    assert together[2].probs().shape == (0, K)


@pytest.mark.parametrize("elements", [1, 3 * K, 100 * K])
def test_tiles_of_any_length_give_the_same(monkeypatch, elements):
    monkeypatch.setattr(prototype_kernels, "_TILE_ELEMENTS", elements)
    teacher, several = cosines(7, K), cosines(2, 7, K)
    expected_targets = reference.sinkhorn(teacher, TEMP, 3)
    assigned = sinkhorn_assignments(teacher, TEMP)
    torch.testing.assert_close(assigned.probs(), expected_targets, rtol=1e-11, atol=1e-14)
    for student, target in ((several[0], assigned), (several, expected_targets)):
        expected = value_and_grad(lambda s: reference.cross_entropy(expected_targets, s, TAU).square().sum(), student)
        actual = value_and_grad(lambda s, t=target: soft_cross_entropy(s, t, TAU).square().sum(), student)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def losses(rows: int, dtype: torch.dtype, temps: tuple[float, float], kernels) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``rows`` against factors, of two views of them against a matrix; value and gradient."""
    generator = torch.Generator().manual_seed(rows)
    teacher, *students = (torch.rand(4, rows, K, generator=generator) * 2 - 1).to(dtype)
    weight = (torch.arange(rows) < rows - 1).float()
    assigned = sinkhorn_assignments(teacher, temps[0], row_weight=weight, kernels=kernels)

    def total(students: Tensor) -> Tensor:
        patches = ibot_loss(students[0], assigned, weight, 2, temps[1], kernels)
        return patches + soft_cross_entropy(students[1:], assigned.probs(), temps[1], kernels).mean(1).sum()

    return value_and_grad(total, torch.stack(students))


def test_compiled_equals_eager_and_compiles_once_per_shape():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    kernels = compiled_kernels(counter)
    shapes = [(6, torch.float32), (9, torch.float32), (6, torch.bfloat16)]
    for shape in shapes:
        for temps in ((0.04, 0.1), (0.0415, 0.1), (0.07, 0.2)):
            eager, compiled = losses(*shape, temps, EAGER), losses(*shape, temps, kernels)
            torch.testing.assert_close(compiled[0], eager[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(compiled[1], eager[1], rtol=2**-8, atol=1e-7)
    # Four passes of Sinkhorn, and cross-entropy forward and backward with factors and with a matrix.
    assert counter.frame_count == (4 + 2 * 2) * len(shapes)


def test_shapes_of_a_run_stay_within_dynamos_limit():
    torch._dynamo.reset()
    kernels = compiled_kernels(counter := CompileCounterWithBackend("eager"))
    teacher_cls, teacher_patches = torch.rand(2 * 4, K), torch.rand(11, K)
    for dtype in (torch.float32, torch.float16):
        batches = teacher_cls.to(dtype), teacher_patches.to(dtype)
        cls, patches = sinkhorn_assignments_of(batches, TEMP, kernels=kernels)
        views = cls.probs().unflatten(0, (2, 4))
        for shape, target in (((2, 4, K), views), ((8, 4, K), views.sum(0)), ((11, K), patches)):
            student = torch.rand(shape).to(dtype)
            soft_cross_entropy(student.requires_grad_(), target, TAU, kernels).sum().backward()
            soft_cross_entropy(student.detach(), target, TAU, kernels)
    # Per dtype: two matrices of the teacher in four passes, three of the student in two.
    assert counter.frame_count == 2 * (2 * 4 + 3 * 2)


class NewTensors(TorchDispatchMode):
    """Note the bytes of every tensor that an operation creates; views and in-place results are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else (out,)
        for result, declared in zip(results, func._schema.returns, strict=False):
            if isinstance(result, Tensor) and declared.alias_info is None:
                self.sizes.append(result.numel() * result.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_float32_matrix_of_the_full_size_is_made(dtype):
    rows, width = 3402, 131072
    with FakeTensorMode():
        teacher = torch.empty(rows, width, dtype=dtype)
        student = torch.empty(rows, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(rows)
        with NewTensors() as new:
            assigned = sinkhorn_assignments(teacher, TEMP, row_weight=weight)
            ibot_loss(student, assigned, weight, 96).backward()
    # The gradient, in 16 bit; everything else is below a hundredth of a float32 matrix.
    assert [size for size in new.sizes if size > rows * width * 4 / 100] == [rows * width * 2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_fused_without_temporaries_or_waiting(dtype):
    torch._dynamo.reset()
    rows, width, kernels = 600, 32768, compiled_kernels("inductor")
    teacher, student = (cosines(rows, width).cuda().to(dtype) for _ in range(2))
    student.requires_grad_()
    weight = (torch.arange(rows, device="cuda") < rows - 20).float()

    def step(kernels) -> tuple[Tensor, Tensor]:
        assigned = sinkhorn_assignments(teacher, TEMP, row_weight=weight, kernels=kernels)
        value = ibot_loss(student, assigned, weight, 1, TAU, kernels)
        return value.detach(), *torch.autograd.grad(value, student)

    expected = step(EAGER)
    step(kernels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, grad = step(kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The gradient, and less than a tenth of it for numbers per row and per prototype.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * grad.numel() * grad.element_size()
    torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.float(), expected[1].float(), rtol=2**-7, atol=1e-6)


def test_autocast_does_not_lower_the_precision():
    student, teacher = cosines(6, K).float(), cosines(6, K).float()

    def evaluate(s: Tensor) -> Tensor:
        return soft_cross_entropy(s, sinkhorn_assignments(teacher, torch.tensor(TEMP)), TAU).sum()

    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_grad(evaluate, student)
    expected = value_and_grad(evaluate, student)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_targets_carry_no_gradient():
    logits = cosines(7, K).requires_grad_()
    assert not sinkhorn_knopp(logits, TEMP).requires_grad
    (grad,) = torch.autograd.grad(soft_cross_entropy(logits, sinkhorn_assignments(logits, TEMP), TAU).sum(), logits)
    targets = reference.sinkhorn(logits.detach(), TEMP, 3)
    expected = value_and_grad(lambda s: reference.cross_entropy(targets, s, TAU).sum(), logits)[1]
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12)
