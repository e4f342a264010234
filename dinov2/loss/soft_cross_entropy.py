"""Cross-entropy between teacher probabilities and student logits, shared by the DINO and iBOT losses."""

from typing import Any

import torch
from torch import Tensor

from dinov2.loss.precision import at_least_float32


def soft_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of each row of student logits s against its teacher probabilities t.

        CE(t, s) = -sum_k t_k log softmax(s / tau)_k = logsumexp(s / tau) sum_k t_k - (s . t) / tau

    It is linear in t: one call on the sum of several teachers gives the sum of their cross-entropies, and a
    row of zeros adds nothing. s is taken relative to its largest value, which leaves CE as it was and exact
    for logits of any size. Only the inputs and three numbers per row are kept for the backward pass, whose
    gradient is (softmax(s / tau) sum_k t_k - t) / tau.

    Args:
        student_logits: (..., K), any float dtype; the gradient comes back in it.
        teacher_probs: (..., K), broadcastable to ``student_logits``; a constant, no gradient flows to it.
        student_temp: tau > 0.

    Returns:
        (...,) float32 (float64 for float64 logits), one value per row of ``student_logits``.
    """
    return _SoftCrossEntropy.apply(student_logits, teacher_probs, student_temp)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
        row_max = at_least_float32(student_logits.amax(-1, keepdim=True))
        scaled = (student_logits - row_max).div_(student_temp)
        log_sum = scaled.exp().sum(-1, keepdim=True).log_()
        mass = teacher_probs.sum(-1, keepdim=True, dtype=scaled.dtype)
        ctx.save_for_backward(student_logits, teacher_probs, row_max, log_sum, mass)
        ctx.student_temp = student_temp
        return (log_sum * mass).squeeze(-1) - scaled.mul_(teacher_probs).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student_logits, teacher_probs, row_max, log_sum, mass = ctx.saved_tensors
        probs = (student_logits - row_max).div_(ctx.student_temp).sub_(log_sum).exp_()
        error = probs.mul_(mass).sub_(teacher_probs)
        return error.mul_(grad[..., None] / ctx.student_temp).to(student_logits.dtype), None, None
