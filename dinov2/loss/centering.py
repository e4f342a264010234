"""Centering, the alternative to Sinkhorn-Knopp for the teacher's targets."""

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum
from dinov2.layers.norm import at_least_float32


class Centering(nn.Module):
    """Keep a running mean of the teacher's logits and subtract it before the softmax.

    DINO (arXiv:2104.14294, section 3.1, equation 4), with t the teacher's logits, T its temperature, c the
    centre and m its momentum, the mean taken over the rows of a step, of all ranks and micro-batches:

        P = softmax((t - c) / T),   afterwards   c <- m c + (1 - m) mean_n t_n

    Args:
        center_shape: of the buffer ``center``; its last dimension is the number of prototypes K, the others are 1.
        center_momentum: m in [0, 1].
    """

    center: Tensor

    def __init__(self, center_shape: tuple[int, ...], center_momentum: float = 0.9) -> None:
        super().__init__()
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self._seen: Tensor | None = None  # of this step's earlier micro-batches: sum of rows, and their number

    def probs(self, logits: Tensor, temp: float | Tensor) -> Tensor:
        """Return softmax((t - c) / T) of (..., K) logits of any float dtype, in float32."""
        return ((logits.detach() - self.center.flatten()) / temp).softmax(-1)

    def update_center(
        self, teacher_output: Tensor, row_weight: Tensor | None = None, completes_step: bool = True
    ) -> None:
        """Move the centre towards the mean of this step's teacher logits; call it after the softmax.

        Every row counts alike, whichever rank and micro-batch holds it; when none counts, the centre stays. One
        all-reduce of K + 1 values; all ranks must call.

        Args:
            teacher_output: (..., K) logits, any float dtype; ranks may hold different numbers of rows.
            row_weight: (...) 1 for rows that count, 0 for padding; None when all count.
            completes_step: whether these are the last logits of the step; until then the centre stays.
        """
        rows = at_least_float32(teacher_output.detach()).flatten(0, -2)
        weight = rows.new_ones(len(rows)) if row_weight is None else row_weight.to(rows.dtype).flatten()
        total = torch.cat([(rows * weight[:, None]).sum(0), weight.sum(0, keepdim=True)])
        total = total if self._seen is None else total + self._seen
        if not completes_step:
            self._seen = total
            return
        self._seen = None
        total = all_reduce_sum(total)
        total, num_rows = total[:-1].to(self.center), total[-1].to(self.center)
        mean = (total / num_rows.clamp_min(1)).view_as(self.center)
        self.center.lerp_(mean, (1 - self.center_momentum) * (num_rows > 0).to(self.center))
