"""Losses compile into one graph and never ask the device for a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from dinov2.loss import (
    DINOLoss,
    KDELoss,
    KoLeoLoss,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    iBOTPatchLoss,
    sinkhorn_assignments_of,
    soft_cross_entropy,
)

K, B, N = 7, 4, 5


def dino_step(student, masks):
    teacher = student.detach()[:2]
    loss = DINOLoss(K)
    targets = loss.sinkhorn_knopp_teacher(teacher.flatten(0, 1), torch.tensor(0.04)).view_as(teacher)
    centred = loss.softmax_center_teacher(teacher, 0.04)
    loss.update_center(teacher.flatten(0, 1))
    return (
        dino_global_loss(student[:2], targets, 8)
        + dino_local_loss(student[2:], targets)
        + loss(student[:2].unbind(), centred.unbind())
    )


def ibot_step(student, masks):
    loss = iBOTPatchLoss(K)
    rows, n_masked = student.flatten(0, 1), masks.sum()
    real = torch.arange(len(rows)) < n_masked
    targets = loss.sinkhorn_knopp_teacher(rows.detach(), 0.04, n_masked)
    loss.update_center(rows.detach(), real)
    return (
        ibot_loss(rows, targets, real.float(), len(masks))
        + loss.forward_masked(rows, targets, masks, n_masked)
        + loss(student, loss.softmax_center_teacher(student.detach(), 0.04), masks)
    )


def factored_step(student, masks):
    rows = student.flatten(0, 1)
    real = (torch.arange(len(rows)) < masks.sum()).float()
    teachers = student[0].detach(), rows.detach()
    cls, patches = sinkhorn_assignments_of(teachers, torch.tensor(0.04), row_weights=[None, real])
    return soft_cross_entropy(student, cls.probs(), 0.1).sum() + ibot_loss(rows, patches, real, len(masks))


def spreading_step(student, masks):
    x = student.flatten(0, 1)
    return KDELoss()(x) + KDELoss(reference_sign=True)(x) + KoLeoLoss()(x)


STEPS = [dino_step, ibot_step, factored_step, spreading_step]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, N, K, requires_grad=True), torch.rand(B, N) < 0.5


@pytest.mark.parametrize("step", STEPS)
def test_compiles_without_a_graph_break(step):
    student, masks = inputs()
    expected = step(student, masks)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(student, masks)
    torch.testing.assert_close(compiled, expected)
    (expected_grad,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(torch.autograd.grad(compiled, student)[0], expected_grad)


@pytest.mark.parametrize("step", STEPS)
def test_never_reads_a_value_from_the_device(step):
    with FakeTensorMode():
        student, masks = inputs()
        step(student, masks).backward()
        assert student.grad.shape == student.shape


@pytest.mark.parametrize("read", [lambda t: t.item(), bool, lambda t: t[t > 0], torch.nonzero])
def test_fake_tensors_refuse_such_reads(read):
    # What the test above rests on.
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        read(torch.randn(()))
