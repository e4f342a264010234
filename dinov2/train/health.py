"""Figures of health of a step: the teacher's targets and the spread of class tokens."""

import math
from collections.abc import Container, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import all_gather_rows, all_reduce_sum
from dinov2.loss import Assignments, StepOutputs

# Elements of a tile of rows: three of 16 MiB at a time, at the moment when a step needs the most memory.
_TILE_ELEMENTS = 2**22
_MOST_TOKENS = 1024  # rows of which RankMe is taken: an eigenvalue problem of that many


@torch.no_grad()
def health_of_targets(outputs: StepOutputs, terms: Container[str]) -> dict[str, Tensor]:
    """Entropy and prototype use of the targets of DINO and iBOT, where ``terms`` names them; all ranks must call.

    Returns:
        0-d float32, of the rows of all ranks, by the names that they are logged under; see `target_figures`. Nothing
        is waited for.
    """
    targets: Mapping[str, tuple[Tensor | Assignments, Tensor | None]] = {
        "dino": (outputs.class_targets.flatten(0, 1), None),
        "ibot": (outputs.patch_targets, (outputs.mask_weight > 0).float()),
    }
    found = {}
    for term, (rows, weight) in targets.items():
        if term in terms:
            found[f"health/{term}_entropy"], found[f"health/{term}_prototype_use"] = target_figures(rows, weight)
    return found


@torch.no_grad()
def target_figures(targets: Tensor | Assignments, row_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean entropy of targets and use of prototypes, both over the rows of all ranks; all ranks must call.

        entropy = mean_n sum_k -p_nk ln p_nk / ln K               0: one prototype a row, 1: uniform rows
        use     = exp(sum_k -q_k ln q_k) / K,  q = mean_n p_n     1 / K: one prototype for all, 1: all alike

    Args:
        targets: (N, K) probabilities, written out or as factors; N may differ between ranks.
        row_weight: (N,) 1 for rows that count, 0 for padding; None when all count.

    Returns:
        Two 0-d float32, NaN where no row counts.
    """
    factored = isinstance(targets, Assignments)
    num_rows, num_prototypes = (targets.logits if factored else targets).shape
    device = (targets.logits if factored else targets).device
    weight = torch.ones(num_rows, device=device) if row_weight is None else row_weight
    sums = torch.zeros(num_prototypes + 2, device=device)
    sums[-1] = weight.sum()
    step = max(_TILE_ELEMENTS // num_prototypes, 1)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        p = _rows_of(targets, rows).float() if factored else targets[rows].float()
        sums[-2] += (torch.special.entr(p).sum(1) * weight[rows]).sum()
        sums[:-2] += (p * weight[rows, None]).sum(0)
    sums = all_reduce_sum(sums)
    mass, entropy, count = sums[:-2], sums[-2], sums[-1]
    use = torch.special.entr(mass / count).sum().exp() / num_prototypes
    return entropy / count / math.log(num_prototypes), use


def _rows_of(targets: Assignments, rows: slice) -> Tensor:
    kept = targets._replace(logits=targets.logits[rows], row_shift=targets.row_shift[rows], v=targets.v[rows])
    return kept.probs()


@torch.no_grad()
def health_of_tokens(tokens: Tensor) -> dict[str, Tensor]:
    """Spread of class tokens (B, D) over the images of all ranks, which must call; waits for the device.

    Those of the teacher tell a collapse apart best: masks and stochastic depth spread the student's even then.
    ``class_token_std`` is sqrt(D) times the standard deviation over the images, averaged over the D entries, of tokens
    scaled to length 1: 0 where all are equal, 1 where they point everywhere (SimSiam, arXiv:2011.10566, section 4.1).
    ``rankme`` is their `dinov2.eval.probe.spread.rankme`, unscaled, of 1,024 at most, between 1 and min(B, D).

    Returns:
        0-d float32 on the device by the names that they are logged under; NaN for tokens that are not finite.
    """
    rows = all_gather_rows(tokens.float()).double()
    unit = F.normalize(rows, dim=1)
    std = unit.std(0, correction=0).mean() * math.sqrt(rows.shape[1])
    return {"health/class_token_std": std.float(), "health/rankme": _rankme(rows[:_MOST_TOKENS]).float()}


def _rankme(rows: Tensor) -> Tensor:
    # By the smaller of the two Gram matrices: in float64 its eigenvalues are exact enough, and it is small.
    gram = rows @ rows.mT if len(rows) <= rows.shape[1] else rows.mT @ rows
    if not gram.isfinite().all():  # for which there are no eigenvalues
        return gram.new_full((), torch.nan)
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()
