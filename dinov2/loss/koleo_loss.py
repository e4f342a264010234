"""KoLeo regulariser: class tokens are pushed away from their nearest neighbour."""

import torch
from torch import Tensor, nn

from dinov2.loss.unit_rows import unit_rows


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko estimate of minus the batch's entropy; falls as the vectors spread.

    Sablayrolles et al. (arXiv:1806.03198, section 3.1), with z the vectors scaled to length 1:

        L_KoLeo = -mean_i log( min_{j != i} ||z_i - z_j|| + eps )

    Args:
        gather: take the vectors of all ranks instead of this rank's; see `all_gather_rows` for why the
            data-parallel mean of the gradients is then exactly that of the joined batch.
    """

    def __init__(self, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the loss of (B, D) class tokens of any float dtype as a 0-d float32.

        Equal vectors do not push each other. With ``gather``, all ranks must call, with equal B.

        Raises:
            ValueError: there are fewer than 2 vectors.
        """
        z = unit_rows(student_output, self.gather)
        # Differences taken directly: 2 - 2 z_i . z_j cancels for near neighbours, the ones that matter here.
        distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        nearest = distance.masked_fill(itself, torch.inf).amin(1)
        return -(nearest + eps).log().mean().float()
