"""Soft cross-entropy, DINO and iBOT against the papers' formulas in float64, values and gradients."""

import math

import pytest
import torch

from dinov2.loss import (
    DINOLoss,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    iBOTPatchLoss,
    sinkhorn_knopp,
    soft_cross_entropy,
)
from tests.helpers import loss_reference as reference
from tests.helpers.loss_reference import value_and_grad

TAU = 0.1
MASKS = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
INDICES = torch.tensor([0, 2, 3, 11, 15, 16, 17, 18, 19])
WEIGHTS = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 5] * 5)
PADDED_INDICES = torch.cat([INDICES, torch.zeros(3, dtype=torch.int64)])
PADDED_WEIGHTS = torch.cat([WEIGHTS, torch.zeros(3)])
ROW = torch.arange(1.0, 6.0)


def padded_rows(patches: torch.Tensor) -> torch.Tensor:
    return patches.flatten(0, 1)[PADDED_INDICES]


def real_rows(patches: torch.Tensor) -> torch.Tensor:
    return patches.flatten(0, 1)[INDICES]


dino, patch_loss = DINOLoss(7, TAU), iBOTPatchLoss(7, TAU)


def papers_ibot(s, t):
    return reference.ibot(s, t, MASKS, TAU)


def papers_sum_over_pairs(s, t):
    return sum(reference.cross_entropy(b, a, TAU).mean() for a in s for b in t)


# Student shape, teacher shape, the library's loss, the paper's.
CASES = {
    "cross-entropy": (
        (5, 7),
        (5, 7),
        lambda s, t: (soft_cross_entropy(s, t, TAU) * ROW).sum(),
        lambda s, t: (reference.cross_entropy(t, s, TAU) * ROW).sum(),
    ),
    "cross-entropy, one teacher for several students": (
        (3, 5, 7),
        (5, 7),
        lambda s, t: (soft_cross_entropy(s, t, TAU) * ROW).sum(),
        lambda s, t: (reference.cross_entropy(t, s, TAU) * ROW).sum(),
    ),
    "DINO global": (
        (2, 4, 7),
        (2, 4, 7),
        lambda s, t: dino_global_loss(s, t, 8, TAU),
        lambda s, t: reference.dino_global(s, t, 8, TAU),
    ),
    "DINO global, three views": (
        (3, 4, 7),
        (3, 4, 7),
        lambda s, t: dino_global_loss(s, t, 0, TAU),
        lambda s, t: reference.dino_global(s, t, 0, TAU),
    ),
    "DINO local": (
        (8, 4, 7),
        (2, 4, 7),
        lambda s, t: dino_local_loss(s, t, TAU),
        lambda s, t: reference.dino_local(s, t, TAU),
    ),
    "DINOLoss.forward": ((3, 4, 7), (2, 4, 7), lambda s, t: dino(list(s), list(t)), papers_sum_over_pairs),
    "iBOT": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: ibot_loss(padded_rows(s), padded_rows(t), PADDED_WEIGHTS, 4, TAU),
        papers_ibot,
    ),
    "iBOTPatchLoss.forward": ((4, 5, 7), (4, 5, 7), lambda s, t: patch_loss(s, t, MASKS), papers_ibot),
    "forward_masked": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: patch_loss.forward_masked(real_rows(s), real_rows(t), MASKS),
        papers_ibot,
    ),
    "forward_masked, one batch of rows": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: patch_loss.forward_masked(real_rows(s)[None], real_rows(t)[None], MASKS, 9, WEIGHTS),
        papers_ibot,
    ),
    "forward_masked, padded": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: patch_loss.forward_masked(padded_rows(s), padded_rows(t), MASKS),
        papers_ibot,
    ),
    "forward_masked, padded, weights for real rows": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: patch_loss.forward_masked(padded_rows(s), padded_rows(t), MASKS, 9, WEIGHTS),
        papers_ibot,
    ),
    "forward_masked, padded, count on the device": (
        (4, 5, 7),
        (4, 5, 7),
        lambda s, t: patch_loss.forward_masked(
            padded_rows(s), padded_rows(t), MASKS, torch.tensor(9), PADDED_WEIGHTS.clamp_min(0.1)
        ),
        papers_ibot,
    ),
}


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # A gradient comes back in the student's dtype: that rounding is all that 16 bit may cost.
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
@pytest.mark.parametrize(("student_shape", "teacher_shape", "ours", "papers"), CASES.values(), ids=CASES)
def test_equals_the_formula(student_shape, teacher_shape, ours, papers, dtype, rtol):
    student = torch.randn(student_shape).to(dtype)
    teacher = (3 * torch.randn(teacher_shape)).softmax(-1)
    expected, expected_grad = value_and_grad(lambda s: papers(s, teacher), student.double())
    value, grad = value_and_grad(lambda s: ours(s, teacher), student)
    assert (value.dtype, grad.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-6)


def test_cross_entropy_gradient_is_exact_in_float64():
    teacher = torch.rand(3, 7, dtype=torch.float64)
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, teacher, TAU), student)


def test_views_weigh_as_in_the_published_recipe():
    # Every cross-entropy against uniform logits is log K; 2 of the 18 pairs are global, 16 local.
    teacher = torch.randn(2, 4, 7).softmax(-1)
    global_loss = dino_global_loss(torch.zeros(2, 4, 7), teacher, num_local_views=8)
    assert global_loss.item() == pytest.approx(2 / 18 * math.log(7))
    assert dino_local_loss(torch.zeros(8, 4, 7), teacher).item() == pytest.approx(16 / 18 * math.log(7))
    assert dino_local_loss(torch.zeros(0, 4, 7), teacher).item() == 0


def test_ibot_divides_by_all_crops():
    # Three of the four crops have masks, and each contributes log K whatever its number of masks.
    loss = ibot_loss(torch.zeros(12, 7), torch.full((12, 7), 1 / 7), PADDED_WEIGHTS, num_crops=4)
    assert loss.item() == pytest.approx(3 / 4 * math.log(7))


def test_cross_entropy_of_extreme_logits():
    student = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, -6e4]], dtype=torch.float16)
    teacher = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    expected, expected_grad = value_and_grad(lambda s: reference.cross_entropy(teacher, s, TAU).sum(), student.double())
    value, grad = value_and_grad(lambda s: soft_cross_entropy(s, teacher, TAU).sum(), student)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2**-10, atol=0)


def test_backward_keeps_the_inputs_and_nothing_else_of_their_size():
    saved = []
    student, teacher = torch.randn(6, 1000, dtype=torch.bfloat16, requires_grad=True), torch.rand(6, 1000)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        soft_cross_entropy(student, teacher, TAU)
    large = [t for t in saved if t.numel() > 6]
    assert {t.data_ptr() for t in large} == {student.data_ptr(), teacher.data_ptr()}


def test_public_teacher_methods_are_sinkhorn():
    teacher = torch.randn(9, 7)
    expected = sinkhorn_knopp(teacher, 0.07)
    assert torch.equal(dino.sinkhorn_knopp_teacher(teacher, 0.07), expected)
    padded = torch.cat([teacher, torch.randn(2, 7)])
    for count in (9, torch.tensor(9), torch.tensor([9])):
        targets = patch_loss.sinkhorn_knopp_teacher(padded, 0.07, n_masked_patches_tensor=count)
        torch.testing.assert_close(targets[:9], expected)
        assert not targets[9:].any()
