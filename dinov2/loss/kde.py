"""KDE regulariser: class tokens are pushed apart until they cover the sphere evenly."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.configs.fields import key
from dinov2.loss.term import LossTerm, StepOutputs
from dinov2.loss.unit_rows import unit_rows


def kde_loss(tokens: Tensor, kappa: float = 5.0, reference_sign: bool = False, gather: bool = False) -> Tensor:
    """Mean log-density of the batch under a von Mises-Fisher kernel estimate; falls as the vectors spread.

    With z the vectors scaled to length 1, N of them, each one's density estimated from the others:

        L_KDE = mean_i [ log sum_{j != i} exp(kappa z_i . z_j) - log(N - 1) ]

    Up to a constant it is minus the resubstitution estimate of the entropy (Wang & Isola, arXiv:2005.10242,
    section 4.2, theorem 1, kappa = 1 / temperature), so it is minimised to make the entropy large; Virchow2
    (arXiv:2408.00738) puts it in KoLeo's place. Its least value, -kappa / (N - 1), is reached on the simplex.

    The published code minimises the entropy itself, -mean_i log sum_j exp(kappa z_i . z_j) with j = i
    included, and so rewards collapse: its least value is reached when all vectors are equal.

    Args:
        tokens: (B, D), any float dtype.
        kappa: concentration of the kernel, > 0.
        reference_sign: compute the published code's expression.
        gather: take the N vectors of all ranks instead of this rank's; all ranks must then call, with equal B. See
            `all_gather_rows` for why the data-parallel mean of the gradients is then exactly that of the joined batch.

    Returns:
        0-d float32.

    Raises:
        ValueError: if there are fewer than 2 vectors.
    """
    z = unit_rows(tokens, gather)
    similarity = kappa * z @ z.mT
    if reference_sign:
        return -similarity.logsumexp(1).mean().float()
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_sum = similarity.masked_fill(itself, -torch.inf).logsumexp(1)
    return (log_sum.mean() - math.log(len(z) - 1)).float()


class KDE(LossTerm):
    """`kde_loss` of each global view's class tokens, summed over the views; keys ``dino.kde_*``."""

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """Arguments of `kde_loss`."""

        kappa: float = key(5.0, "concentration of the kernel", above=0)
        reference_sign: bool = key(False, "the published code's sign")
        gather: bool = key(False, "over the batch of all ranks")

    @classmethod
    def options_of(cls, config: Any) -> LossTerm.Options:
        """Keys ``dino.kde_*``."""
        dino = config.dino
        return cls.Options(dino.kde_loss_weight, dino.kde_kappa, dino.kde_reference_sign, dino.kde_gather)

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss of the student's class tokens."""
        options = self.options
        arguments = options.kappa, options.reference_sign, options.gather
        return sum(kde_loss(view, *arguments) for view in outputs.class_tokens)
