"""Regularisers that spread class tokens over the sphere: KoLeo and KDE."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dinov2.configs.fields import key
from dinov2.distributed import all_gather_rows
from dinov2.loss.term import LossTerm, StepOutputs

_SHORTEST = 1e-8  # length of a row that has a direction; that of Meta's normalisation
_RESOLVED = 2.0**-21  # distance of unit vectors of float32 numbers beyond their rounding


def unit_rows(tokens: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
    """Return (B, D) tokens as rows of length 1, (N, D) float64, and a mask (N, N) of each row with itself.

    The matrices that follow are batch by batch, so float64 costs nothing, and it is out of reach of autocast
    and TF32, which would blur the distance between near neighbours. A row of length 0 has no direction, so that it
    stays in the origin and gets no gradient, which would be 1 / 0: such is the class token of an image that all
    branches of a network have dropped, where it starts from 0.

    With ``gather`` the rows of all ranks are joined; all must then call, with equal B. See `all_gather_rows` for why
    the data-parallel mean of the gradients is then exactly that of the joined batch. Raises ValueError if there are
    fewer than 2 rows.
    """
    rows = tokens.double()
    length = rows.norm(dim=-1, keepdim=True)
    rows = torch.where(length > _SHORTEST, rows, rows.detach()) / length.clamp_min(_SHORTEST)
    rows = all_gather_rows(rows) if gather else rows
    if len(rows) < 2:
        raise ValueError(f"Spreading class tokens needs at least 2 images in the batch, and it has {len(rows)}.")
    return rows, torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def koleo_loss(tokens: Tensor, gather: bool = False, eps: float = 1e-8, topk: int = 1, group: int = 0) -> Tensor:
    """Kozachenko-Leonenko estimate of minus the batch's entropy, 0-d float32; falls as the vectors spread.

    Sablayrolles et al. (arXiv:1806.03198, section 3.1), with z the vectors scaled to length 1:

        L_KoLeo = -mean_i log( min_{j != i} ||z_i - z_j|| + eps )

    Equal vectors do not push each other, nor do those that differ by float32's rounding alone, such as class tokens of
    two images that the same branches have dropped: the gradient would be of length 1 / eps, along noise. With ``topk``
    > 1 the mean is over so many nearest ones of each, and with ``group`` neighbours are sought among so many rows in a
    row, of the joined batch with ``gather`` (DINOv3).

    Args:
        tokens: (B, D), any float dtype.
        gather: over the vectors of all ranks, see `unit_rows`.
        eps: keeps the logarithm finite.
        topk: nearest vectors, at least 1; ValueError if there are not as many others.
        group: rows of each group, 0 for all in one; ValueError if it does not divide their number.
    """
    z, _ = unit_rows(tokens, gather)
    if group and len(z) % group:
        raise ValueError(f"KoLeo in groups of {group} needs a number of images that it divides, not {len(z)}.")
    z = z.unflatten(0, (-1, group or len(z)))  # (groups, rows, D)
    rows = z.shape[1]
    itself = torch.eye(rows, dtype=torch.bool, device=z.device)
    # Differences taken directly: 2 - 2 z_i . z_j cancels for near neighbours, the ones that matter here.
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    others = distance.masked_fill(itself, torch.inf)
    if topk >= rows:
        raise ValueError(f"KoLeo over {topk} neighbours needs more images than that in a batch or group, not {rows}.")
    nearest = others.amin(2) if topk == 1 else others.topk(topk, largest=False).values
    nearest = torch.where(nearest > _RESOLVED, nearest, nearest.detach())
    return -(nearest + eps).log().mean().float()


class KoLeo(LossTerm):
    """`koleo_loss` of each global view's class tokens, summed over the views."""

    meta_keys: ClassVar[Mapping[str, str]] = {
        "weight": "dino.koleo_loss_weight", "gather": "dino.koleo_gather", "topk": "dino.koleo_topk",
        "group": "dino.koleo_group",
    }  # fmt: skip

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """Arguments of `koleo_loss`."""

        gather: bool = key(False, "over the batch of all ranks")
        topk: int = key(1, "nearest neighbours that are pushed away", least=1)
        group: int = key(0, "consecutive images among which neighbours are sought; 0: all", least=0)

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss of the student's class tokens."""
        o = self.options
        return sum(koleo_loss(view, o.gather, topk=o.topk, group=o.group) for view in outputs.class_tokens)


def kde_loss(tokens: Tensor, kappa: float = 5.0, reference_sign: bool = False, gather: bool = False) -> Tensor:
    """Mean log-density under a von Mises-Fisher kernel estimate, 0-d float32; falls as the vectors spread.

    With z the vectors scaled to length 1, N of them, each one's density estimated from the others:

        L_KDE = mean_i [ log sum_{j != i} exp(kappa z_i . z_j) - log(N - 1) ]

    Up to a constant it is minus the resubstitution estimate of the entropy (Wang & Isola, arXiv:2005.10242,
    section 4.2, theorem 1, kappa = 1 / temperature), so it is minimised to make the entropy large; Virchow2
    (arXiv:2408.00738) puts it in KoLeo's place. Its least value, -kappa / (N - 1), is reached on the simplex.

    The published code minimises the entropy itself, -mean_i log sum_j exp(kappa z_i . z_j) with j = i
    included, and so rewards collapse: its least value is reached when all vectors are equal.

    Args:
        tokens, gather: as of `koleo_loss`.
        kappa: concentration of the kernel, > 0.
        reference_sign: compute the published code's expression.
    """
    z, itself = unit_rows(tokens, gather)
    similarity = kappa * z @ z.mT
    if reference_sign:
        return -similarity.logsumexp(1).mean().float()
    log_sum = similarity.masked_fill(itself, -torch.inf).logsumexp(1)
    return (log_sum.mean() - math.log(len(z) - 1)).float()


class KDE(LossTerm):
    """`kde_loss` of each global view's class tokens, summed over the views."""

    meta_keys: ClassVar[Mapping[str, str]] = {
        "weight": "dino.kde_loss_weight", "kappa": "dino.kde_kappa", "reference_sign": "dino.kde_reference_sign",
        "gather": "dino.kde_gather", "ramp_epochs": "dino.kde_ramp_epochs",
    }  # fmt: skip

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """Arguments of `kde_loss`."""

        kappa: float = key(5.0, "concentration of the kernel", above=0)
        reference_sign: bool = key(False, "the published code's sign")
        gather: bool = key(False, "over the batch of all ranks")

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss of the student's class tokens."""
        o = self.options
        return sum(kde_loss(view, o.kappa, o.reference_sign, o.gather) for view in outputs.class_tokens)
