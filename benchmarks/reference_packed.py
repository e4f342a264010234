"""Reference step in the manner of DINOv2's trainer (facebookresearch/dinov2), as MedARC-AI/OpenMidnight runs it.

The same behaviour: global and local crops of the student packed into one matrix of rows; stochastic depth on a drawn
subset of images, int(B (1 - p)) of each crop size, two ``randperm`` per branch, gather and scatter-add around it;
attention within images; norm, LayerScale and residual sum as kernels of their own; masked patches through ``nonzero``
into a zeroed buffer of the bound's length; Sinkhorn-Knopp that rewrites the K x B float32 matrix four times an
iteration; the local cross-entropy as a loop over 8 x 2 matmuls; 16-bit residual stream; ``foreach`` AdamW, one clip
per module, EMA as a multiplication and an addition; host copies on the computing stream; ``.item()`` of every loss
and ``torch.cuda.synchronize()`` in every step.

Kinder than the original, that is, faster here: no FSDP around the modules, no all-reduce of each loss; bf16 by
default, without the gradient scaler's passes (``dtype="fp16"`` has them); the host's search for NaN only with
``host_isnan``; no data loading. Alike in cost: autocast casts each weight once a step, as FSDP does.

Harsher: without xformers, attention is one dense call per crop size (two copies, to split and to join), gathering is
select and concatenate, and LayerScale is not fused into the scatter-add, which is OpenMidnight's own path where
xformers is missing; log-softmax is in float32, as under autocast, where the original's eager branch computes in fp16;
``nonzero`` runs on the device, at a moment when it is idle, where the original's data worker runs it.

A ViT-G/14 step of 48 images keeps 79 GB of activations (counted from what autograd saves), 93 with a float32 stream,
beside some 40 GB of states, logits and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference_parts import (
    SINKHORN_ITERATIONS,
    STUDENT_TEMP,
    EagerStep,
    Sizes,
    StepSpec,
    at_least_float32,
    pack,
    unpack,
)

# Tensor dimensions below: B images, L local views, N tokens, D width, K prototypes, M padded masked rows.

Branch = Callable[[Tensor, Sizes], Tensor]


class ReferenceStep(EagerStep):
    """One training step; see the module.

    Args:
        spec, student_state, teacher_state, device: see `EagerStep`; the drop rate is the same in all blocks.
        half_stream: keep the residual stream in the matmuls' dtype, as the original's FSDP does; False: float32.
        host_isnan: look for NaN among half-precision crops in host memory, before each step.
    """

    def __init__(
        self,
        spec: StepSpec,
        student_state: Mapping[str, Tensor],
        teacher_state: Mapping[str, Tensor],
        device: torch.device | str,
        *,
        half_stream: bool = True,
        host_isnan: bool = False,
    ) -> None:
        super().__init__(spec, student_state, teacher_state, device, [spec.drop_path] * spec.depth)
        self.stream = self.dtype if half_stream and spec.dtype != "fp32" else None
        self.host_isnan = host_isnan
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=spec.dtype == "fp16")
        self._host_crops: dict[str, Tensor] = {}

    def step(
        self, batch: Mapping[str, Tensor], lr: float, wd: float, momentum: float, teacher_temp: float
    ) -> dict[str, float]:
        """Make one step and wait for it; the losses as numbers."""
        if self.host_isnan:
            self._nan_on_host(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch, teacher_temp)
        self.scaler.scale(losses["total_loss"]).backward()
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self._update(lr, wd, momentum, lambda: self.scaler.step(self.optimizer))
        self.scaler.update()
        values = {name: loss.item() for name, loss in losses.items()}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return values

    def losses(self, batch: Mapping[str, Tensor], teacher_temp: float) -> dict[str, Tensor]:
        """See `EagerStep.losses`."""
        batch = self._on_device(batch)
        index = batch["masks"].flatten().nonzero().flatten()
        with self.autocast():
            class_targets, patch_targets = self._targets(batch, index, teacher_temp)
            class_tokens, class_logits, patch_logits = self._student_outputs(batch, index)
            images, crops = len(class_tokens) // 2, len(batch["global_crops"])
            local_logits, global_logits = class_logits.split([len(class_logits) - crops, crops])
            pairs = 2 * self.spec.local_crops + 2
            losses = {"dino_local_crops_loss": _local_loss(local_logits.split(images), class_targets) / pairs}
            # Each global view against the other one: the targets' halves change places.
            swapped = torch.cat(class_targets[::-1])
            losses["dino_global_crops_loss"] = (
                cross_entropies(global_logits, swapped).mean() * len(class_targets) / pairs
            )
            per_patch = cross_entropies(patch_logits, patch_targets) * batch["mask_weight"][: len(index)]
            losses["ibot_loss"] = per_patch.sum() / crops
        return self._total(losses, class_tokens.split(images))

    @torch.no_grad()
    def _targets(self, batch: Mapping[str, Tensor], index: Tensor, temp: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """Probabilities of the two views' class tokens, (B, K) each, and of the masked patches."""
        backbone = self.teacher["backbone"]
        x = backbone.tokens(batch["global_crops"], None, self.stream)
        size = [x.shape[:2]]
        rows = pack([x])
        for block in backbone.blocks:
            rows = rows + block.attention(rows, size)
            rows = rows + block.feed_forward(rows, size)
        tokens = unpack(backbone.norm(rows), size)[0]
        bound = len(batch["mask_indices"])
        class_logits, patch_logits = self._logits(self.teacher, tokens[:, 0], tokens, index, bound)
        return sinkhorn(class_logits, temp).chunk(2), sinkhorn(patch_logits, temp)

    def _student_outputs(self, batch: Mapping[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class tokens of the global crops (2B, D), class logits (LB + 2B, K), logits of the masked patches."""
        backbone = self.student["backbone"]
        crops = [
            backbone.tokens(batch["global_crops"], batch["masks"], self.stream),
            backbone.tokens(batch["local_crops"], None, self.stream),
        ]
        for block, rate in zip(backbone.blocks, self.rates, strict=True):
            for branch in (block.attention, block.feed_forward):
                crops = add_branch(crops, branch, rate)
        global_tokens, local_tokens = (backbone.norm(x) for x in crops)
        class_tokens = torch.cat([local_tokens[:, 0], global_tokens[:, 0]])
        bound = len(batch["mask_indices"])
        logits = self._logits(self.student, class_tokens, global_tokens, index, bound)
        return global_tokens[:, 0], *logits

    def _logits(
        self, network: nn.ModuleDict, class_tokens: Tensor, tokens: Tensor, index: Tensor, bound: int
    ) -> tuple[Tensor, Tensor]:
        """Logits of class tokens and, the heads running over ``bound`` rows, of the masked patches."""
        patches = tokens[:, 1 + self.spec.registers :].flatten(0, 1)
        buffer = patches.new_zeros(bound, patches.shape[1])
        buffer[: len(index)].copy_(patches.index_select(0, index))
        if self.spec.separate_ibot_head:
            class_logits, patch_logits = network["dino_head"](class_tokens), network["ibot_head"](buffer)
        else:
            logits = network["dino_head"](torch.cat([class_tokens, buffer]))
            class_logits, patch_logits = logits.split([len(class_tokens), bound])
        return class_logits, patch_logits[: len(index)]

    def _nan_on_host(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a crop in host memory has a NaN; crops elsewhere are stood in for by equally many numbers."""
        found = False
        for name in ("global_crops", "local_crops"):
            crops = batch[name]
            if crops.device.type != "cpu" or crops.dtype != torch.float16:
                if name not in self._host_crops:
                    self._host_crops[name] = torch.rand(crops.shape).half()
                crops = self._host_crops[name]
            found |= bool(torch.isnan(crops).any())
        return found


def add_branch(crops: list[Tensor], branch: Branch, rate: float) -> list[Tensor]:
    """Add a residual branch to (B, N, D) of each crop size, computed for int(B (1 - rate)) images, together."""
    if rate == 0:
        sizes = [x.shape[:2] for x in crops]
        rows = pack(crops)
        return unpack(rows + branch(rows, sizes), sizes)
    kept = [torch.randperm(len(x), device=x.device)[: max(int(len(x) * (1 - rate)), 1)] for x in crops]
    chosen = [x.index_select(0, images) for x, images in zip(crops, kept, strict=True)]
    sizes = [x.shape[:2] for x in chosen]
    updates = unpack(branch(pack(chosen), sizes), sizes)
    return [
        torch.index_add(x, 0, images, update.to(x.dtype), alpha=len(x) / len(images))
        for x, images, update in zip(crops, kept, updates, strict=True)
    ]


def sinkhorn(logits: Tensor, temp: float) -> Tensor:
    """Assignments of (M, K) logits, rows summing to 1: one pass over the matrix for every division."""
    q = (at_least_float32(logits) / temp).exp().t()
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(SINKHORN_ITERATIONS):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of (M, K) student logits."""
    return -(targets * _log_softmax(logits)).sum(-1)


def _local_loss(views: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    total = 0
    for view in views:
        log_probs = _log_softmax(view)
        for target in targets:
            total = total - (target * log_probs).sum(-1).mean()
    return total


def _log_softmax(logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits / STUDENT_TEMP, dim=-1, dtype=dtype)
