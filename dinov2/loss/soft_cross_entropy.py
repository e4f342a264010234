"""Cross-entropy between teacher probabilities and student logits, shared by the DINO and iBOT losses."""

from typing import Any

import torch
from torch import Tensor

from dinov2.layers.norm import at_least_float32
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels, inverse
from dinov2.loss.sinkhorn import Assignments


def soft_cross_entropy(
    student_logits: Tensor,
    teacher: Tensor | Assignments,
    student_temp: float | Tensor,
    kernels: PrototypeKernels = EAGER,
) -> Tensor:
    """Cross-entropy of each row of student logits s against its teacher probabilities t.

        CE(t, s) = -sum_k t_k log softmax(s / tau)_k = logsumexp(s / tau) sum_k t_k - (s . t) / tau

    It is linear in t: one call on the sum of several teachers gives the sum of their cross-entropies, and a
    row of zeros adds nothing. s is taken relative to its largest value, which leaves CE as it was and exact
    for logits of any size. Only the inputs and three numbers per row are kept for the backward pass, whose
    gradient is (softmax(s / tau) sum_k t_k - t) / tau.

    Args:
        student_logits: (..., N, K), any float dtype; the gradient comes back in it, and is the only new tensor of
            this size.
        teacher: (..., N, K), broadcastable to ``student_logits``, or factors of a matrix of just its shape; a
            constant, no gradient flows to it.
        student_temp: tau > 0.
        kernels: implementation of the passes over the logits.

    Returns:
        (..., N) float32 (float64 for float64 logits), one value per row of ``student_logits``.
    """
    target = teacher if isinstance(teacher, Assignments) else (teacher.expand_as(student_logits),)
    return _SoftCrossEntropy.apply(kernels, student_temp, student_logits, *target)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: PrototypeKernels, temp: float | Tensor, student: Tensor, *target: Tensor) -> Tensor:
        row_max = at_least_float32(student.amax(-1))
        scale = inverse(temp, row_max)
        # Detached, because a compiled kernel is specialised on whether its arguments need gradients.
        entropy, log_sum, mass = kernels.cross_entropy(student.detach(), row_max, scale, *target)
        ctx.save_for_backward(student, row_max, log_sum, mass, scale, *target)
        ctx.kernels = kernels
        return entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, row_max, log_sum, mass, scale, *target = ctx.saved_tensors
        # Contiguous, because a sum hands its gradient down expanded: one layout, one compiled kernel.
        numbers = row_max, log_sum, mass, grad.contiguous()
        error = ctx.kernels.cross_entropy_grad(student, *numbers, scale, *target)
        return None, None, error, *[None] * len(target)
