"""Two ranks compute what one process computes on the joined batch: targets, centres, losses, gradients."""

import pytest
import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_size
from dinov2.loss import (
    DINOLoss,
    KDELoss,
    KoLeoLoss,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    iBOTPatchLoss,
    sinkhorn_assignments_of,
    sinkhorn_knopp,
)
from dinov2.loss.spreading import koleo_loss
from tests.helpers.loss_reference import value_and_grad
from tests.helpers.spawn import run_ranks

IMAGES, WIDTH, PROTOTYPES, TEMP = 3, 5, 11, 0.3
PADDED_ROWS, MASKED_ROWS = 8, (7, 2)
TARGETS = {
    "dino targets": 1,
    "ibot targets": 0,
    "targets of uneven batches": 0,
    "targets of a wide range": 0,
    "targets at once": 0,
    "targets of uneven batches at once": 0,
}


def batches() -> list[dict[str, Tensor]]:
    """Inputs of each rank; views are the first dimension where there are three."""
    rng = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return [
        {
            "teacher_cls": normal(2, IMAGES, PROTOTYPES),
            "global_cls": normal(2, IMAGES, WIDTH),
            "local_cls": normal(4, IMAGES, WIDTH),
            "teacher_patches": normal(PADDED_ROWS, PROTOTYPES),
            "patches": normal(PADDED_ROWS, WIDTH),
            "mask_weight": normal(PADDED_ROWS).abs() * (torch.arange(PADDED_ROWS) < num_masked),
            "uneven": normal(num_masked - 2, PROTOTYPES),
        }
        for num_masked in MASKED_ROWS
    ]


def join(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.cat([rank[name] for rank in ranks], dim=1 if first.dim() == 3 else 0)
        for name, first in ranks[0].items()
    }


def evaluate(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return targets, centres, and each loss with its parameter's gradient, averaged over ranks."""
    counts = x["mask_weight"] > 0
    cls_targets = sinkhorn_knopp(x["teacher_cls"].flatten(0, 1), TEMP).view_as(x["teacher_cls"])
    patch_targets = sinkhorn_knopp(x["teacher_patches"], TEMP, row_weight=counts)
    patches_at_once, uneven_at_once = sinkhorn_assignments_of(
        [x["teacher_patches"], x["uneven"]], TEMP, row_weights=[counts, None]
    )
    num_images = x["global_cls"].shape[1]

    losses = {
        "dino global": lambda w: dino_global_loss(x["global_cls"] @ w, cls_targets, 4),
        "dino local": lambda w: dino_local_loss(x["local_cls"] @ w, cls_targets),
        "ibot": lambda w: ibot_loss(x["patches"] @ w, patch_targets, x["mask_weight"], 2 * num_images),
        "ibot factored": lambda w: ibot_loss(x["patches"] @ w, patches_at_once, x["mask_weight"], 2 * num_images),
        "kde": lambda w: KDELoss(gather=True)(x["global_cls"][0] @ w),
        "kde as published": lambda w: KDELoss(reference_sign=True, gather=True)(x["global_cls"][0] @ w),
        "koleo": lambda w: KoLeoLoss(gather=True)(x["global_cls"][0] @ w),
        "koleo in groups over ranks": lambda w: koleo_loss(x["global_cls"][0] @ w, gather=True, group=2),
    }
    parameter = torch.linspace(-1, 1, WIDTH * PROTOTYPES, dtype=torch.float64).sin().view(WIDTH, PROTOTYPES)
    results = {}
    for name, loss in losses.items():
        value, grad = value_and_grad(loss, parameter)
        results[name] = all_reduce_sum(value) / get_global_size()
        results[f"{name} gradient"] = all_reduce_sum(grad) / get_global_size()

    dino, ibot = DINOLoss(PROTOTYPES), iBOTPatchLoss(PROTOTYPES)
    dino.update_center(x["teacher_cls"])
    ibot.update_center(x["teacher_patches"], counts)
    return results | {
        "dino centre": dino.center,
        "ibot centre": ibot.center,
        "dino targets": cls_targets,
        "ibot targets": patch_targets,
        "targets of uneven batches": sinkhorn_knopp(x["uneven"], TEMP),
        "targets of a wide range": sinkhorn_knopp(5 * x["uneven"], 0.04),
        "targets at once": patches_at_once.probs(),
        "targets of uneven batches at once": uneven_at_once.probs(),
    }


def _evaluate_rank(rank: int) -> dict[str, Tensor]:
    return evaluate(batches()[rank])


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Tensor]]:
    return run_ranks(_evaluate_rank)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Tensor]:
    return evaluate(join(batches()))


@pytest.mark.parametrize(("name", "dim"), TARGETS.items())
def test_targets(two_ranks, one_process, name, dim):
    joined = torch.cat([rank[name] for rank in two_ranks], dim)
    torch.testing.assert_close(joined, one_process[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "loss", ["dino global", "dino local", "ibot", "ibot factored", "kde", "kde as published", "koleo"]
)
def test_losses_and_gradients(two_ranks, one_process, loss):
    for rank in two_ranks:
        torch.testing.assert_close(rank[loss], one_process[loss], rtol=1e-6, atol=0)
        gradient = one_process[f"{loss} gradient"]
        torch.testing.assert_close(rank[f"{loss} gradient"], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centre", ["dino centre", "ibot centre"])
def test_centres(two_ranks, one_process, centre):
    assert one_process[centre].any()
    for rank in two_ranks:
        torch.testing.assert_close(rank[centre], one_process[centre], rtol=1e-6, atol=1e-8)
