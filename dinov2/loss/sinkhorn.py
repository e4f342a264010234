"""Sinkhorn-Knopp: teacher targets that use every prototype equally."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_max, all_reduce_sum
from dinov2.layers.norm import at_least_float32
from dinov2.loss.prototype_kernels import EAGER, PrototypeKernels, inverse, shifted_exp

# Keeps 1/sum, and sums of up to 1e8 such terms, inside float32's range; see `sinkhorn_assignments` for when a sum
# can be as small.
_SMALLEST_SUM = 1e-30


class Assignments(NamedTuple):
    """The matrix P_nk = v_n exp((l_nk - c_k - r_n) / T) u_k, not written out.

    `soft_cross_entropy` takes it as it is: one more pass over 16-bit logits instead of a float32 matrix.
    """

    logits: Tensor  # (N, K) teacher outputs l, any float dtype
    row_shift: Tensor  # (N,) r, float32 (float64 for float64 logits), as all that follow
    column_shift: Tensor  # (K,) c
    u: Tensor  # (K,) scaling of the prototypes
    v: Tensor  # (N,) scaling of the rows
    inverse_temp: Tensor  # 0-d, 1 / T

    def probs(self) -> Tensor:
        """Write P out: (N, K), float32 (float64 for float64 logits), without a gradient."""
        kernel = shifted_exp(self.logits.detach(), self.row_shift, self.column_shift, self.inverse_temp)
        return kernel.mul_(self.u).mul_(self.v[:, None])


def sinkhorn_knopp(
    logits: Tensor, teacher_temp: float | Tensor, n_iterations: int = 3, row_weight: Tensor | None = None
) -> Tensor:
    """Write `sinkhorn_assignments` out as (N, K) `Assignments.probs`: rows that count sum to 1, padded rows are 0."""
    return sinkhorn_assignments(logits, teacher_temp, n_iterations, row_weight).probs()


def sinkhorn_assignments(
    logits: Tensor,
    teacher_temp: float | Tensor,
    n_iterations: int = 3,
    row_weight: Tensor | None = None,
    kernels: PrototypeKernels = EAGER,
) -> Assignments:
    """Turn teacher logits into assignments whose prototypes carry equal mass over the batch of all ranks.

    SwAV (arXiv:2006.09882, section 3.1, equation 5), with l the logits, T the temperature, w the row weights:

        P_nk = v_n E_nk u_k,   E_nk = exp(l_nk / T),   v = w to begin with, then n_iterations times
        u_k = 1 / sum_n v_n E_nk      (over the rows of all ranks)
        v_n = w_n / sum_k E_nk u_k

    Usually written as a matrix that is divided by its total and then, in turn, by K times its prototype sums
    and by N times its row sums. Total, K and N cancel, so only the two scaling vectors are iterated, and the
    number of rows need not be known. E is not kept: each half of an iteration derives it from the logits anew,
    because reading 16 bits and taking exp costs less than reading 32.

    The range of the logits does not matter, although exp alone would overflow: E is taken relative to a shift of
    each prototype, c_k = max_n l_nk over the rows of all ranks, and of each row, r_n = max_k (l_nk - c_k), and v
    begins as exp(r_n / T), which leaves P as it was. No entry of E is then above 1, and each row and each prototype
    has an entry of 1: where l_nk = c_k, r_n is 0. So the first sums are between 1 and N, each later one is at most
    K or N times smaller or larger than the one before, and none of three iterations leaves float32's range.

    Args:
        logits: (N, K) teacher outputs, any float dtype; finite, padded rows included. N may differ
            between ranks and be 0. The result keeps them: leave them as they are.
        teacher_temp: T > 0; a 0-d tensor spares recompilation of a caller under ``torch.compile``.
        n_iterations: at least 1. One all-reduce of K values each, after one for c; all ranks must call.
        row_weight: (N,) 1 for rows that count, 0 for padding; None when all count.
        kernels: implementation of the passes over the logits.

    Raises:
        ValueError: if ``n_iterations`` is less than 1.
    """
    return sinkhorn_assignments_of([logits], teacher_temp, n_iterations, [row_weight], kernels)[0]


@torch.no_grad()
def sinkhorn_assignments_of(
    batches: Sequence[Tensor],
    teacher_temp: float | Tensor,
    n_iterations: int = 3,
    row_weights: Sequence[Tensor | None] | None = None,
    kernels: PrototypeKernels = EAGER,
) -> list[Assignments]:
    """`sinkhorn_assignments` of each of several matrices, in as many all-reduces as one takes.

    Args:
        batches: (N_i, K_i) logits, of one dtype.
        row_weights: (N_i,) or None for each; None when all rows of all count.
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations is {n_iterations}; Sinkhorn-Knopp needs at least 1.")
    weights = [
        at_least_float32(logits.new_ones(len(logits))) if weight is None else weight
        for logits, weight in zip(batches, row_weights or [None] * len(batches), strict=True)
    ]
    tops = torch.cat([kernels.column_max(*rows) for rows in zip(batches, weights, strict=True)])
    tops = all_reduce_max(at_least_float32(tops))
    columns = tops.where(tops > -torch.inf, 0.0).split([logits.shape[1] for logits in batches])
    scale = inverse(teacher_temp, tops)
    weights = [weight.to(tops.dtype) for weight in weights]
    matrices, v = [], []
    for logits, column_shift, weight in zip(batches, columns, weights, strict=True):
        row_shift = kernels.row_max(logits, column_shift)
        matrices.append((logits, row_shift, column_shift))
        v.append((row_shift * scale).exp().where(weight > 0, 0.0))
    for _ in range(n_iterations):
        sums = [kernels.column_sums(*m, v_, scale) for m, v_ in zip(matrices, v, strict=True)]
        scaling = all_reduce_sum(torch.cat(sums)).clamp_min_(_SMALLEST_SUM).reciprocal_()
        u = scaling.split([logits.shape[1] for logits in batches])
        sums = [kernels.row_sums(*m, u_, scale) for m, u_ in zip(matrices, u, strict=True)]
        v = [weight / total for weight, total in zip(weights, sums, strict=True)]
    return [Assignments(*m, u_, v_, scale) for m, u_, v_ in zip(matrices, u, v, strict=True)]
