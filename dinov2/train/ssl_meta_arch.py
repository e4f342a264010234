"""DINOv2's student, teacher and losses: one self-distillation step up to the loss, and the teacher's EMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.configs import Config, config_from_mapping
from dinov2.distributed import get_global_size, is_main_process
from dinov2.fsdp import load_full_state_dict, shard
from dinov2.layers import DINOHead
from dinov2.loss import (
    EAGER,
    Assignments,
    DINOLoss,
    KDELoss,
    KoLeoLoss,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    iBOTPatchLoss,
    sinkhorn_assignments_of,
)
from dinov2.models import build_model_from_cfg
from dinov2.train.update.optim import parameter_groups
from dinov2.train.update.weight_update import ema_update
from dinov2.utils.dtypes import DTYPES

# Tensor dimensions below: V = 2 global views, L local views, B images, D width, K prototypes, M masked rows.
_VIEWS = 2


class SSLMetaArch(nn.Module):
    """Student and teacher (``backbone``, ``dino_head`` and, where separate, ``ibot_head``) with their losses.

    The teacher starts as a copy of the student, is never trained, and follows it by `update_teacher`
    (DINOv2, arXiv:2304.07193, section 4; iBOT, arXiv:2111.07832).

    Args:
        cfg: a `Config`, or a mapping of Meta's keys, which is merged over the defaults.
        weights_device: where the networks are built; ``meta`` allocates nothing, for ranks that receive their
            weights from rank 0 in `prepare_for_distributed_training`.
    """

    def __init__(self, cfg: Config | Mapping[str, Any], weights_device: torch.device | str | None = None):
        super().__init__()
        self.cfg = cfg = cfg if isinstance(cfg, Config) else config_from_mapping(cfg)
        with torch.device(weights_device or torch.get_default_device()):
            student_backbone, teacher_backbone, self.embed_dim = build_model_from_cfg(cfg)
            self.student = self._network(student_backbone)
            self.teacher = self._network(teacher_backbone)
        self.copy_student_to_teacher()
        self.teacher.requires_grad_(False)
        self.teacher.eval()
        ibot_prototypes = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else cfg.dino.head_n_prototypes
        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(ibot_prototypes)
        self.koleo_loss = KoLeoLoss(gather=cfg.dino.koleo_gather)
        self.kernels = EAGER
        self.kde_loss = KDELoss(cfg.dino.kde_kappa, cfg.dino.kde_reference_sign, cfg.dino.kde_gather)

    def _network(self, backbone: nn.Module) -> nn.ModuleDict:
        modules = {"backbone": backbone, "dino_head": self._head(self.cfg.dino)}
        if self.cfg.ibot.separate_head:
            modules["ibot_head"] = self._head(self.cfg.ibot)
        return nn.ModuleDict(modules)

    def _head(self, head: Any) -> DINOHead:
        return DINOHead(
            self.embed_dim,
            head.head_n_prototypes,
            nlayers=head.head_nlayers,
            hidden_dim=head.head_hidden_dim,
            bottleneck_dim=head.head_bottleneck_dim,
        )

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.student.backbone.cls_token.device

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Set the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def copy_student_to_teacher(self) -> None:
        """Make the teacher equal to the student; before `prepare_for_distributed_training`."""
        self.teacher.load_state_dict(self.student.state_dict())

    def freeze_all_but_last_blocks(self, n: int) -> None:
        """Train only the last ``n`` backbone blocks, the final norm and the heads; 0 leaves all trainable.

        Raises:
            ValueError: there are fewer than ``n`` blocks.
        """
        backbone = self.student.backbone
        if n > len(backbone.blocks):
            raise ValueError(
                f"train.unfreeze_last_n_blocks = {n} exceeds the {len(backbone.blocks)} blocks of "
                f"{self.cfg.student.arch}; use at most that, or 0 to train everything."
            )
        if n == 0:
            return
        backbone.requires_grad_(False)
        for module in (*backbone.blocks[len(backbone.blocks) - n :], backbone.norm):
            module.requires_grad_(True)

    def prepare_for_distributed_training(self, device: torch.device | None = None) -> None:
        """Move to ``device`` and, with more than one process, give every rank its shard of rank 0's weights.

        All ranks must call. Modules are sharded one by one, blocks gathered one at a time.
        """
        device = device or self.device
        if get_global_size() > 1:
            for network, precision in self._networks():
                for name, module in network.items():
                    whole = module.state_dict() if is_main_process() else {}
                    module.to("meta")
                    settings = getattr(precision, name)
                    shard(
                        module,
                        module.blocks if name == "backbone" else (),
                        device=device,
                        strategy=settings.sharding_strategy,
                        param_dtype=DTYPES[settings.mixed_precision.param_dtype],
                        reduce_dtype=DTYPES[settings.mixed_precision.reduce_dtype],
                        prefetch=self.cfg.performance.prefetch_blocks,
                    )
                    module.to_empty(device=device)
                    load_full_state_dict(module, whole)
        self.to(device)

    def get_params_groups(self) -> list[dict]:
        """The student's parameter groups; see `parameter_groups`."""
        return parameter_groups(
            self.student, self.cfg.optim.layerwise_decay, self.cfg.optim.patch_embed_lr_mult
        )

    def compute_losses(self, batch: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """The losses of one batch; all ranks must call.

        ::

            total = dino.loss_weight * (L_local + L_global) + ibot.loss_weight * L_iBOT
                    + sum over the two global views of kde_loss_weight * L_KDE + koleo_loss_weight * L_KoLeo

        Args:
            batch: on the networks' device: normalised ``global_crops`` (2B, 3, S, S) and ``local_crops``
                (L*B, 3, s, s), view-major; ``masks`` bool (2B, N); ``mask_indices`` (M,) and ``mask_weight``
                (M,), 0 on padding.
            teacher_temp: temperature of the teacher's targets.

        Returns:
            0-d float32 tensors: ``total_loss`` and its terms, unweighted. A term of weight 0 is left out.
        """
        cfg = self.cfg
        cls_targets, patch_targets = self._teacher_targets(batch, teacher_temp)
        cls_tokens, cls_logits, patch_logits = self._student_outputs(batch)
        losses: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if cfg.dino.loss_weight > 0:
            num_local = len(cls_logits) - _VIEWS
            if num_local:
                losses["dino_local_crops_loss"] = dino_local_loss(
                    cls_logits[_VIEWS:], cls_targets, kernels=self.kernels
                )
            losses["dino_global_crops_loss"] = dino_global_loss(
                cls_logits[:_VIEWS], cls_targets, num_local, kernels=self.kernels
            )
            weights |= dict.fromkeys(losses, cfg.dino.loss_weight)
        if cfg.ibot.loss_weight > 0:
            crops = len(batch["global_crops"])
            weight = batch["mask_weight"]
            losses["ibot_loss"] = ibot_loss(patch_logits, patch_targets, weight, crops, kernels=self.kernels)
            weights["ibot_loss"] = cfg.ibot.loss_weight
        for name, weight, regulariser in (
            ("kde_loss", cfg.dino.kde_loss_weight, self.kde_loss),
            ("koleo_loss", cfg.dino.koleo_loss_weight, self.koleo_loss),
        ):
            if weight > 0:
                losses[name] = sum(regulariser(view) for view in cls_tokens)
                weights[name] = weight
        return {"total_loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}

    @torch.no_grad()
    def _teacher_targets(
        self, batch: Mapping[str, Any], teacher_temp: float
    ) -> tuple[Tensor, Tensor | Assignments]:
        """Probabilities of the global views' CLS tokens (V, B, K) and of the masked patches (M, K)."""
        (cls_tokens,), patches = self._read_tokens(self.teacher, [batch["global_crops"]], [None], batch)
        cls_logits, patch_logits = self._apply_heads(self.teacher, cls_tokens, patches)
        row_weight = (batch["mask_weight"] > 0).float()
        if self.cfg.train.centering == "sinkhorn_knopp":
            both, weights = [cls_logits, patch_logits], [None, row_weight]
            of_cls, patch_targets = sinkhorn_assignments_of(both, teacher_temp, 3, weights, self.kernels)
            cls_targets = of_cls.probs()
            if not self.cfg.debug.factored_targets:
                patch_targets = patch_targets.probs()
        else:
            cls_targets = self.dino_loss.softmax_center_teacher(cls_logits, teacher_temp)
            patch_targets = self.ibot_patch_loss.softmax_center_teacher(patch_logits, teacher_temp)
            self.dino_loss.update_center(cls_logits)
            self.ibot_patch_loss.update_center(patch_logits, row_weight)
        return cls_targets.unflatten(0, (_VIEWS, -1)), patch_targets

    def _student_outputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """CLS tokens of the global views (V, B, D), CLS logits of all views (V+L, B, K), patch logits (M, K)."""
        crops, masks = [batch["global_crops"]], [batch["masks"]]
        if len(batch["local_crops"]):
            crops, masks = [*crops, batch["local_crops"]], [*masks, None]
        cls_tokens, patches = self._read_tokens(self.student, crops, masks, batch)
        cls_logits, patch_logits = self._apply_heads(self.student, torch.cat(cls_tokens), patches)
        images = len(batch["global_crops"]) // _VIEWS
        return (
            cls_tokens[0].unflatten(0, (_VIEWS, images)),
            cls_logits.unflatten(0, (-1, images)),
            patch_logits,
        )

    def _read_tokens(
        self,
        network: nn.ModuleDict,
        crops: list[Tensor],
        masks: list[Tensor | None],
        batch: Mapping[str, Any],
    ) -> tuple[list[Tensor], Tensor]:
        """All that the losses read: class tokens (C, D) of each crop size, masked patches (M, D) of the first."""
        debug, index = self.cfg.debug, batch["mask_indices"]
        packed = [(crops, masks)]
        passes = packed if debug.packed_crops else [([c], [m]) for c, m in zip(crops, masks, strict=True)]
        outputs: list[dict[str, Tensor]] = []
        with self._autocast(self._precision(network).backbone):
            for some, their in passes:
                wanted = index[:0] if outputs else index
                if not debug.prune_last_block:
                    wanted = None
                outputs += network.backbone(some, masks=their, is_training=True, patch_index=wanted)
        if debug.prune_last_block:
            patches = outputs[0]["x_norm_indexedtokens"]
        else:
            patches = outputs[0]["x_norm_patchtokens"].flatten(0, 1).index_select(0, index)
        return [out["x_norm_clstoken"] for out in outputs], patches

    def _apply_heads(
        self, network: nn.ModuleDict, cls_tokens: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of CLS tokens and of masked patches; a shared head sees both in one call."""
        precision = self._precision(network)
        if "ibot_head" in network:
            with self._autocast(precision.dino_head):
                cls_logits = network.dino_head(cls_tokens)
            with self._autocast(precision.ibot_head):
                return cls_logits, network.ibot_head(patches)
        with self._autocast(precision.dino_head):
            logits = network.dino_head(torch.cat([cls_tokens, patches]))
        return logits.split([len(cls_tokens), len(patches)])

    def _precision(self, network: nn.ModuleDict) -> Any:
        return getattr(self.cfg.compute_precision, "student" if network is self.student else "teacher")

    def _autocast(self, settings: Any) -> torch.autocast:
        dtype = DTYPES[settings.mixed_precision.param_dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def update_teacher(self, m: float, healthy: Tensor | float = 1.0) -> None:
        """Move the teacher towards the student: ``t <- m t + (1 - m) s``; no communication.

        Args:
            m: momentum in [0, 1].
            healthy: 1, or a 0-d tensor that is 0 to leave the teacher as it is.
        """
        ema_update(self.student, self.teacher, (1 - m) * healthy)

    def forward_backward(self, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """DINOv2's public step on a batch from ``collate_data_and_cast``: losses, with gradients accumulated."""
        losses = self.compute_losses(_from_meta_batch(images, self.device), teacher_temp)
        losses["total_loss"].backward()
        return losses

    def _networks(self) -> tuple[tuple[nn.ModuleDict, Any], ...]:
        precision = self.cfg.compute_precision
        return (self.student, precision.student), (self.teacher, precision.teacher)


def _from_meta_batch(images: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    names = {
        "global_crops": "collated_global_crops",
        "local_crops": "collated_local_crops",
        "masks": "collated_masks",
        "mask_indices": "mask_indices_list",
        "mask_weight": "masks_weight",
    }
    return {ours: images[theirs].to(device, non_blocking=True) for ours, theirs in names.items()}
