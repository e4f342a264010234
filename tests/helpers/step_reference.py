"""The losses of one whole step as the papers write them: one crop at a time, loops over views, plain indexing.

Backbone and heads are the networks under test (they have oracles of their own); everything between and after them
is written anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import loss_reference

STUDENT_TEMP = 0.1
CENTER_MOMENTUM = 0.9
KOLEO_EPS = 1e-8


def crop_tokens(backbone: nn.Module, crop: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class token (D,) and patch tokens (N, D) of one crop (3, S, S) alone."""
    out = backbone(crop[None], masks=None if mask is None else mask[None], is_training=True)
    return out["x_norm_clstoken"][0], out["x_norm_patchtokens"][0]


def targets(rows: Tensor, center: Tensor, cfg: Any, temp: float) -> Tensor:
    """The teacher's probabilities for all rows of the batch."""
    if cfg.train.centering == "sinkhorn_knopp":
        return loss_reference.sinkhorn(rows, temp, 3)
    return ((rows - center) / temp).softmax(-1)


def step_losses(
    arch: Any, batch: dict[str, Tensor], temp: float, centers: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Losses by the names of `SSLMetaArch.compute_losses`, and the centres (CLS, patches) after the step.

    Args:
        arch: student, teacher and their configuration, in float64, without stochastic depth.
        batch: collated; only the crops and ``masks`` are used.
        temp: of the teacher.
        centers: (K,) each.
    """
    cfg = arch.cfg
    masks, num_crops = batch["masks"], len(batch["masks"])
    num_images = num_crops // 2
    with torch.no_grad():
        teacher = run_network(arch.teacher, batch["global_crops"], [None] * num_crops, masks)
        cls_rows, patch_rows = torch.stack(teacher[1]), torch.cat(teacher[2])
        cls_targets = targets(cls_rows, centers[0], cfg, temp).unflatten(0, (2, num_images))
        patch_targets = targets(patch_rows, centers[1], cfg, temp).split([int(m.sum()) for m in masks])
    cls_tokens, cls_logits, patch_logits = run_network(arch.student, batch["global_crops"], masks, masks)
    losses = {}
    num_local = len(batch["local_crops"]) // num_images
    if num_local:
        tokens = [crop_tokens(arch.student.backbone, crop)[0] for crop in batch["local_crops"]]
        logits = torch.stack([arch.student.dino_head(token[None])[0] for token in tokens])
        losses["dino_local_crops_loss"] = loss_reference.dino_local(
            logits.unflatten(0, (num_local, num_images)), cls_targets, STUDENT_TEMP
        )
    student = torch.stack(cls_logits).unflatten(0, (2, num_images))
    losses["dino_global_crops_loss"] = loss_reference.dino_global(student, cls_targets, num_local, STUDENT_TEMP)
    losses["ibot_loss"] = sum(
        loss_reference.cross_entropy(t, s, STUDENT_TEMP).mean() / (2 * num_images)
        for t, s in zip(patch_targets, patch_logits, strict=True)
        if len(t)
    )
    views = torch.stack(cls_tokens).split(num_images)
    kde = loss_reference.kde_as_published if cfg.dino.kde_reference_sign else loss_reference.kde
    losses["kde_loss"] = sum(kde(view, cfg.dino.kde_kappa) for view in views)
    losses["koleo_loss"] = sum(loss_reference.koleo(view, KOLEO_EPS) for view in views)
    weights = {
        "dino_local_crops_loss": cfg.dino.loss_weight,
        "dino_global_crops_loss": cfg.dino.loss_weight,
        "ibot_loss": cfg.ibot.loss_weight,
        "kde_loss": cfg.dino.kde_loss_weight,
        "koleo_loss": cfg.dino.koleo_loss_weight,
    }
    total = sum(weights[name] * loss for name, loss in losses.items())
    moved = tuple(
        CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * rows.mean(0)
        for center, rows in zip(centers, (cls_rows, patch_rows), strict=True)
    )
    return {"total_loss": total, **losses}, moved


def run_network(
    network: nn.ModuleDict, crops: Tensor, inputs: list[Tensor | None] | Tensor, masks: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per crop: class token, its logits (K,), and the logits of its masked patches (|M|, K').

    Args:
        network: student or teacher.
        crops: (C, 3, S, S).
        inputs: per crop the mask that the backbone is given, or None.
        masks: bool (C, N), which patches are wanted.
    """
    patch_head = network["ibot_head"] if "ibot_head" in network else network["dino_head"]
    cls_tokens, cls_logits, patch_logits = [], [], []
    for crop, given, mask in zip(crops, inputs, masks, strict=True):
        cls_token, patches = crop_tokens(network.backbone, crop, given)
        cls_tokens.append(cls_token)
        cls_logits.append(network.dino_head(cls_token[None])[0])
        patch_logits.append(patch_head(patches[mask]))
    return cls_tokens, cls_logits, patch_logits
