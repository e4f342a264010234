"""Reference step in the manner of nanopath (MedARC-AI/nanopath).

The same behaviour: one forward pass per crop size; bf16 autocast over float32 weights and a float32 residual stream;
stochastic depth that computes every image and multiplies each branch by a Bernoulli draw per image; masks made image
by image on the device, then ``nonzero`` and boolean indexing, which wait for it; Sinkhorn-Knopp that rewrites its
float32 matrix at every division; a cross-entropy of its own for each of the 18 pairs of views; ``foreach`` AdamW, EMA
as a multiplication and an addition; losses left on the device. ``checkpointing`` recomputes each block in the
backward pass, the original's answer to memory: without it a ViT-G/14 step of 48 images keeps 128 GB of activations
(counted from what autograd saves) beside some 40 GB of states, logits and copies; with it 11.

nanopath's rate rises linearly over the blocks (``linear=True``); the default is the recipe's, equal in all blocks. The
arithmetic is the same either way. Clipping per module and a trained ``weight_g`` are the recipe's too.

Kinder than the original, that is, faster here: masks are given and copied image by image, where the original draws
and writes several rectangles an image; draw and scale of stochastic depth are one multiplication; losses are never
fetched; no data loading, no scheduled probes.

Harsher: KDE in float32 instead of bf16, which no clock will see.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.reference_parts import (
    SINKHORN_ITERATIONS,
    STUDENT_TEMP,
    Block,
    EagerStep,
    Sizes,
    StepSpec,
    at_least_float32,
    pack,
    unpack,
)

# Tensor dimensions below: B images, L local views, N patches or tokens, D width, K prototypes.


class ReferenceStep(EagerStep):
    """One training step; see the module.

    Args:
        spec, student_state, teacher_state, device: see `EagerStep`; fp16 is not offered.
        linear: let the drop rate rise linearly from 0 to the spec's over the blocks.
        checkpointing: recompute each student block in the backward pass.
    """

    def __init__(
        self,
        spec: StepSpec,
        student_state: Mapping[str, Tensor],
        teacher_state: Mapping[str, Tensor],
        device: torch.device | str,
        *,
        linear: bool = False,
        checkpointing: bool = False,
    ) -> None:
        if spec.dtype == "fp16":
            raise ValueError("dtype is 'fp16'; bf16 or fp32 is expected, since nothing scales the loss here.")
        last = max(spec.depth - 1, 1)
        rates = [spec.drop_path * (i / last if linear else 1) for i in range(spec.depth)]
        super().__init__(spec, student_state, teacher_state, device, rates)
        self.checkpointing = checkpointing

    def step(
        self, batch: Mapping[str, Tensor], lr: float, wd: float, momentum: float, teacher_temp: float
    ) -> dict[str, Tensor]:
        """Make one step without waiting for its end; the losses on the device."""
        losses = self.losses(batch, teacher_temp)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total_loss"].backward()
        self._clip()
        self._update(lr, wd, momentum, self.optimizer.step)
        return {name: loss.detach() for name, loss in losses.items()}

    def losses(self, batch: Mapping[str, Tensor], teacher_temp: float) -> dict[str, Tensor]:
        """See `EagerStep.losses`."""
        batch = self._on_device(batch)
        global_crops, images = batch["global_crops"], len(batch["global_crops"]) // 2
        masks, index, weight = masks_by_image(batch["masks"])
        with self.autocast():
            with torch.no_grad():
                class_token, patches = self._tokens(self.teacher, global_crops, None)
                class_targets = sinkhorn(self.teacher["dino_head"](class_token), teacher_temp).split(images)
                patch_targets = sinkhorn(self._patch_head(self.teacher)(patches.index_select(0, index)), teacher_temp)
            global_class, patches = self._tokens(self.student, global_crops, masks)
            local_class, _ = self._tokens(self.student, batch["local_crops"], None)
            head = self.student["dino_head"]
            global_logits, local_logits = (head(t).split(images) for t in (global_class, local_class))
            pairs = 2 * self.spec.local_crops + 2
            losses = {
                "dino_local_crops_loss": sum(
                    cross_entropies(student, target).mean() for student in local_logits for target in class_targets
                )
                / pairs,
                "dino_global_crops_loss": (
                    cross_entropies(global_logits[0], class_targets[1]).mean()
                    + cross_entropies(global_logits[1], class_targets[0]).mean()
                )
                / pairs,
            }
            patch_logits = self._patch_head(self.student)(patches.index_select(0, index))
            losses["ibot_loss"] = (cross_entropies(patch_logits, patch_targets) * weight).sum() / len(masks)
        return self._total(losses, global_class.split(images))

    def _patch_head(self, network: nn.ModuleDict) -> nn.Module:
        return network["ibot_head" if self.spec.separate_ibot_head else "dino_head"]

    def _tokens(self, network: nn.ModuleDict, crops: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class tokens (B, D) and patch tokens (B * N, D) of one crop size."""
        backbone = network["backbone"]
        x = backbone.tokens(crops, masks, None)
        for block, rate in zip(backbone.blocks, self.rates, strict=True):
            if network is self.teacher:
                x = _run_block(block, x, 0.0)
            elif self.checkpointing:
                x = checkpoint(_run_block, block, x, rate, use_reentrant=False)
            else:
                x = _run_block(block, x, rate)
        x = backbone.norm(x)
        return x[:, 0], x[:, 1 + self.spec.registers :].flatten(0, 1)


def _run_block(block: Block, x: Tensor, rate: float) -> Tensor:
    sizes: Sizes = [x.shape[:2]]
    x = x + drop_path(unpack(block.attention(pack([x]), sizes), sizes)[0], rate)
    return x + drop_path(unpack(block.feed_forward(pack([x]), sizes), sizes)[0], rate)


def drop_path(update: Tensor, rate: float) -> Tensor:
    """Zero each image's update (B, N, D) with probability ``rate``, and scale the others by 1 / (1 - rate)."""
    if rate == 0:
        return update
    factor = update.new_empty(len(update), 1, 1).bernoulli_(1 - rate)
    return update * factor.div_(1 - rate)


def masks_by_image(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (2B, N) written one image at a time, the masked patches' index, and 1 / (masked of the image) of each."""
    masks = torch.zeros_like(given)
    for image, mask in enumerate(given):
        masks[image] = mask
    index = masks.flatten().nonzero().flatten()
    weight = masks.sum(1, keepdim=True).clamp(min=1).reciprocal().expand_as(masks)
    return masks, index, weight[masks]


def sinkhorn(logits: Tensor, temp: float) -> Tensor:
    """Assignments of (M, K) logits, rows summing to 1; each half-iteration divides the matrix anew."""
    q = (at_least_float32(logits) / temp).exp()
    rows, prototypes = q.shape
    q /= q.sum()
    for _ in range(SINKHORN_ITERATIONS):
        q /= q.sum(0) * prototypes
        q /= q.sum(1, keepdim=True) * rows
    return q * rows


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of (M, K) student logits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(targets * F.log_softmax(logits / STUDENT_TEMP, dim=-1, dtype=dtype)).sum(-1)
