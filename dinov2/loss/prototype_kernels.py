"""The passes over prototype logits that Sinkhorn-Knopp and the cross-entropy are made of.

Each reads its matrices once, computes in float32 (float64 for float64 logits), and copies no matrix into it as a
whole: the logits of a step of the recipe (3402 x 131072) take 0.9 GB in 16 bit, 1.8 GB in 32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Dimensions below: (..., N, K) matrices, K prototypes; (..., N) numbers per row. Scales 1/T are 0-d tensors.
# A target is (probabilities,), or Sinkhorn's factors (logits, row_shift, column_shift, u, v, inverse_temp).

# Elements of a tile of rows. Temporaries of the eager passes are tiles: 16 MiB each in float32, at most three at
# a time; a single row, where that is longer. Small enough for caches, large enough to hide launches.
_TILE_ELEMENTS = 2**22


class PrototypeKernels(NamedTuple):
    """One implementation of the passes; see `column_max` and its siblings for their arguments."""

    column_max: Callable[..., Tensor]
    row_max: Callable[..., Tensor]
    column_sums: Callable[..., Tensor]
    row_sums: Callable[..., Tensor]
    cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]]
    cross_entropy_grad: Callable[..., Tensor]


def inverse(temp: float | Tensor, like: Tensor) -> Tensor:
    """Return 1 / T as a 0-d tensor of the device and dtype of ``like``, without waiting for the device."""
    if isinstance(temp, Tensor):
        return temp.to(like.device, like.dtype, non_blocking=True).reciprocal()
    return like.new_full((), temp).reciprocal()


def shifted_exp(logits: Tensor, row_shift: Tensor, column_shift: Tensor, scale: Tensor) -> Tensor:
    """Return a new E_nk = exp((l_nk - c_k - r_n) s), (..., N, K) in the dtype of the shifts.

    Of logits l (..., N, K) of any float dtype, shifts of the rows r (..., N) and columns c (K,), and a 0-d scale s.
    """
    # The column's shift first: `row_max` is of this very difference, so that the larger of the two cancels exactly.
    return (logits - column_shift).sub_(row_shift[..., None]).mul_(scale).exp_()


def column_max(logits: Tensor, weight: Tensor) -> Tensor:
    """Return max_n l_nk over the rows of (N, K) logits whose weight (N,) is not 0: (K,) in their dtype.

    Minus infinity where there is none.
    """
    shown = (weight > 0)[:, None]
    result = logits.new_full(logits.shape[-1:], -torch.inf)
    for rows in _tiles(logits):
        if logits.shape[0]:  # an empty dimension has no maximum
            result = torch.maximum(result, logits[rows].where(shown[rows], -torch.inf).amax(0))
    return result


def row_max(logits: Tensor, column_shift: Tensor) -> Tensor:
    """Return max_k (l_nk - c_k), (N,) in the dtype of the shift (K,)."""
    return torch.cat([(logits[rows] - column_shift).amax(1) for rows in _tiles(logits)])


def column_sums(logits: Tensor, row_shift: Tensor, column_shift: Tensor, v: Tensor, inverse_temp: Tensor) -> Tensor:
    """Return sum_n v_n E_nk, (K,), with E of `shifted_exp` from (N, K) logits."""
    # Multiplied and summed, not a matmul: that would not fuse, and autocast would round it.
    return sum(
        shifted_exp(logits[rows], row_shift[rows], column_shift, inverse_temp).mul_(v[rows, None]).sum(0)
        for rows in _tiles(logits)
    )


def row_sums(logits: Tensor, row_shift: Tensor, column_shift: Tensor, u: Tensor, inverse_temp: Tensor) -> Tensor:
    """Return sum_k E_nk u_k, (N,), with E of `shifted_exp` from (N, K) logits."""
    tiles = [
        shifted_exp(logits[rows], row_shift[rows], column_shift, inverse_temp).mul_(u).sum(1) for rows in _tiles(logits)
    ]
    return torch.cat(tiles)


def cross_entropy(
    student: Tensor, row_max: Tensor, inverse_temp: Tensor, *target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, per row, the cross-entropy, log sum_k exp((s_k - row_max) / tau), and the target's mass.

    Args:
        student: (..., N, K) logits s.
        row_max: (..., N) each row's largest logit, float32 or better.
        inverse_temp: 1 / tau.
        target: probabilities or factors, of the student's shape.
    """
    tiles = []
    for rows in _tiles(student):
        scaled = (student[..., rows, :] - row_max[..., rows, None]).mul_(inverse_temp)
        log_sum = scaled.exp().sum(-1).log()
        t = _target_rows(target, rows)
        mass = t.sum(-1, dtype=scaled.dtype)
        tiles.append((log_sum * mass - scaled.mul_(t).sum(-1), log_sum, mass))
    entropy, log_sum, mass = (torch.cat(parts, -1) for parts in zip(*tiles, strict=True))
    return entropy, log_sum, mass


def cross_entropy_grad(
    student: Tensor, row_max: Tensor, log_sum: Tensor, mass: Tensor, grad: Tensor, inverse_temp: Tensor, *target: Tensor
) -> Tensor:
    """Return grad_n (softmax(s / tau)_nk mass_n - t_nk) / tau in the student's shape and dtype.

    Args:
        grad: (..., N) gradient of each row's cross-entropy; the other arguments as `cross_entropy` took and
            returned them.
    """
    result = torch.empty_like(student)
    scale = grad * inverse_temp
    for rows in _tiles(student):
        error = (student[..., rows, :] - row_max[..., rows, None]).mul_(inverse_temp)
        error.sub_(log_sum[..., rows, None]).exp_().mul_(mass[..., rows, None])
        result[..., rows, :] = error.sub_(_target_rows(target, rows)).mul_(scale[..., rows, None])
    return result


EAGER = PrototypeKernels(column_max, row_max, column_sums, row_sums, cross_entropy, cross_entropy_grad)


def compiled_kernels(backend: str | Callable[..., Callable]) -> PrototypeKernels:
    """Return the passes compiled, each for the whole matrix; Inductor keeps its intermediates in registers.

    Each combination of shapes and dtypes compiles once, whatever the temperatures. Beyond eight
    combinations a pass, Dynamo's limit, the call raises: ``torch.compiler.reset()`` before going on to others.
    ``backend`` is that of ``torch.compile``, by name or the function itself.
    """
    return PrototypeKernels(*(torch.compile(p, fullgraph=True, dynamic=False, backend=backend) for p in EAGER))


def _tiles(matrix: Tensor) -> list[slice]:
    """Slices of N, at least one; a single one under compilation, which leaves no temporaries to bound."""
    num_rows = step = max(matrix.shape[-2], 1)
    if not torch.compiler.is_compiling():
        width = math.prod(matrix.shape) // num_rows
        step = max(_TILE_ELEMENTS // max(width, 1), 1)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _target_rows(target: tuple[Tensor, ...], rows: slice) -> Tensor:
    if len(target) == 1:
        return target[0][..., rows, :]
    logits, row_shift, column_shift, u, v, inverse_temp = target
    kernel = shifted_exp(logits[..., rows, :], row_shift[..., rows], column_shift, inverse_temp)
    return kernel.mul_(u).mul_(v[..., rows, None])
