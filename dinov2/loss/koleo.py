"""KoLeo regulariser: class tokens are pushed away from their nearest neighbour."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.configs.fields import key
from dinov2.loss.term import LossTerm, StepOutputs
from dinov2.loss.unit_rows import unit_rows


def koleo_loss(tokens: Tensor, gather: bool = False, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko estimate of minus the batch's entropy; falls as the vectors spread.

    Sablayrolles et al. (arXiv:1806.03198, section 3.1), with z the vectors scaled to length 1:

        L_KoLeo = -mean_i log( min_{j != i} ||z_i - z_j|| + eps )

    Equal vectors do not push each other.

    Args:
        tokens: (B, D), any float dtype.
        gather: take the vectors of all ranks instead of this rank's; all ranks must then call, with equal B. See
            `all_gather_rows` for why the data-parallel mean of the gradients is then exactly that of the joined batch.
        eps: keeps the logarithm finite.

    Returns:
        0-d float32.

    Raises:
        ValueError: if there are fewer than 2 vectors.
    """
    z = unit_rows(tokens, gather)
    # Differences taken directly: 2 - 2 z_i . z_j cancels for near neighbours, the ones that matter here.
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(1)
    return -(nearest + eps).log().mean().float()


class KoLeo(LossTerm):
    """`koleo_loss` of each global view's class tokens, summed over the views; keys ``dino.koleo_*``."""

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """Arguments of `koleo_loss`."""

        gather: bool = key(False, "over the batch of all ranks")

    @classmethod
    def options_of(cls, config: Any) -> LossTerm.Options:
        """Keys ``dino.koleo_*``."""
        return cls.Options(config.dino.koleo_loss_weight, config.dino.koleo_gather)

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss of the student's class tokens."""
        return sum(koleo_loss(view, self.options.gather) for view in outputs.class_tokens)
