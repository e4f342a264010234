"""KDE regulariser: class tokens are pushed apart until they cover the sphere evenly."""

import math

import torch
from torch import Tensor, nn

from dinov2.loss.unit_rows import unit_rows


class KDELoss(nn.Module):
    """Mean log-density of the batch under a von Mises-Fisher kernel estimate; falls as the vectors spread.

    With z the vectors scaled to length 1, N of them, each one's density estimated from the others:

        L_KDE = mean_i [ log sum_{j != i} exp(kappa z_i . z_j) - log(N - 1) ]

    Up to a constant it is minus the resubstitution estimate of the entropy (Wang & Isola, arXiv:2005.10242,
    section 4.2, theorem 1, kappa = 1 / temperature), so it is minimised to make the entropy large; Virchow2
    (arXiv:2408.00738) puts it in KoLeo's place. Its least value, -kappa / (N - 1), is reached on the simplex.

    The published code minimises the entropy itself, -mean_i log sum_j exp(kappa z_i . z_j) with j = i
    included, and so rewards collapse: its least value is reached when all vectors are equal.

    Args:
        kappa: concentration of the kernel, > 0.
        reference_sign: compute the published code's expression, literally.
        gather: take the N vectors of all ranks instead of this rank's; see `all_gather_rows` for why the
            data-parallel mean of the gradients is then exactly that of the joined batch.
    """

    def __init__(self, kappa: float = 5.0, reference_sign: bool = False, gather: bool = False) -> None:
        super().__init__()
        self.kappa = kappa
        self.reference_sign = reference_sign
        self.gather = gather

    def forward(self, student_output: Tensor) -> Tensor:
        """Return the loss of (B, D) class tokens of any float dtype as a 0-d float32.

        With ``gather``, all ranks must call, with equal B.

        Raises:
            ValueError: there are fewer than 2 vectors.
        """
        z = unit_rows(student_output, self.gather)
        similarity = self.kappa * z @ z.mT
        if self.reference_sign:
            return -similarity.logsumexp(1).mean().float()
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_sum = similarity.masked_fill(itself, -torch.inf).logsumexp(1)
        return (log_sum.mean() - math.log(len(z) - 1)).float()
