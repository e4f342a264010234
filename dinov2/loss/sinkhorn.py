"""Sinkhorn-Knopp: teacher targets that use every prototype equally."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import all_reduce_max, all_reduce_sum
from dinov2.loss.precision import at_least_float32

# Keeps 1/sum, and sums of up to 1e8 such terms, inside float32's range.
_SMALLEST_SUM = 1e-30


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    teacher_temp: float | Tensor,
    n_iterations: int = 3,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Turn teacher logits into assignments whose prototypes carry equal mass over the batch of all ranks.

    SwAV (arXiv:2006.09882, section 3.1, equation 5), with l the logits, T the temperature, w the row weights:

        P_nk = v_n E_nk u_k,   E_nk = exp(l_nk / T),   v = w to begin with, then n_iterations times
        u_k = 1 / sum_n v_n E_nk      (over the rows of all ranks)
        v_n = w_n / sum_k E_nk u_k

    Usually written as a matrix that is divided by its total and then, in turn, by K times its prototype sums
    and by N times its row sums. Total, K and N cancel, so only the two scaling vectors are iterated, E is
    computed once, and the number of rows need not be known.

    exp cannot overflow: E is taken relative to each row's largest logit, and v begins as exp of that one's
    distance from the largest logit of all ranks, which leaves P as it was. A prototype whose every logit lies
    more than about 69 T below that largest one (2.8 at T = 0.04; logits of unit vectors span 2) gets less
    than its share; rows sum to 1 regardless.

    Args:
        logits: (N, K) teacher outputs, any float dtype; finite, padded rows included. N may differ
            between ranks and be 0.
        teacher_temp: T > 0; a 0-d tensor spares recompilation under ``torch.compile``.
        n_iterations: at least 1. One all-reduce of K values each, after one of a scalar; all ranks must call.
        row_weight: (N,) 1 for rows that count, 0 for padding; None when all count.

    Returns:
        (N, K) float32 (float64 for float64 logits); rows that count sum to 1, padded rows are 0.

    Raises:
        ValueError: ``n_iterations`` is less than 1.
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations is {n_iterations}; Sinkhorn-Knopp needs at least 1")
    row_max = at_least_float32(logits.amax(1))
    weight = torch.ones_like(row_max) if row_weight is None else row_weight.to(row_max.dtype)
    counts = weight > 0
    # Padded, because a rank without rows has no maximum.
    shared_max = all_reduce_max(F.pad(row_max.where(counts, -torch.inf), (0, 1), value=-torch.inf).amax())
    v = ((row_max - shared_max) / teacher_temp).exp().where(counts, 0.0)
    kernel = (logits - row_max[:, None]).div_(teacher_temp).exp_()
    with torch.autocast(logits.device.type, enabled=False):
        for _ in range(n_iterations):
            u = all_reduce_sum(kernel.mT @ v).clamp_min_(_SMALLEST_SUM).reciprocal_()
            v = weight / (kernel @ u)
    return kernel.mul_(u).mul_(v[:, None])
