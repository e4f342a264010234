"""DINOv2's student, teacher and losses: one self-distillation step up to the loss, and the teacher's EMA."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov2.configs import Config, config_from_mapping
from dinov2.configs.schema import AUTO_EPOCHS
from dinov2.distributed import broadcast_object, get_global_size, is_main_process
from dinov2.fsdp import defer_reduction, load_full_state_dict, shard
from dinov2.layers import DINOHead
from dinov2.loss import (
    EAGER,
    Assignments,
    Centering,
    LossContext,
    StepOutputs,
    TermWithTeacher,
    build_terms,
    sinkhorn_assignments_of,
)
from dinov2.models import build_model_from_cfg
from dinov2.train.frozen_teacher import FrozenTeacher
from dinov2.train.health import health_of_targets
from dinov2.train.update.optim import parameter_groups
from dinov2.train.update.weight_update import ema_update
from dinov2.utils.dtypes import DTYPES

# Tensor dimensions below: V = 2 global views, L local views, B images, N patches, D width, K prototypes, M masked rows.
_VIEWS = 2


@dataclass(frozen=True)
class _Outputs:
    """Of one network, views and images in one dimension; class tokens and patches are those of the global views."""

    class_tokens: Tensor
    class_logits: Tensor
    patch_logits: Tensor
    patch_tokens: Tensor | None


class SSLMetaArch(nn.Module):
    """Student and teacher (``backbone``, ``dino_head`` and, where separate, ``ibot_head``) with the terms of the loss.

    The teacher starts as a copy of the student, is never trained, and follows it by `update_teacher`
    (DINOv2, arXiv:2304.07193, section 4; iBOT, arXiv:2111.07832). ``frozen_teachers`` are those of the terms that have
    one, by their names.

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
        class_prototypes = cfg.dino.head_n_prototypes
        patch_prototypes = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else class_prototypes
        epochs = AUTO_EPOCHS if cfg.optim.epochs == "auto" else cfg.optim.epochs
        pixels = cfg.augmentation.normalize_mean, cfg.augmentation.normalize_std
        self.losses = build_terms(cfg, LossContext(self.embed_dim, class_prototypes, patch_prototypes, epochs, *pixels))
        with torch.device(weights_device or torch.get_default_device()):
            frozen = {
                name: FrozenTeacher(name, term, self.teacher.backbone)
                for name, term in self.losses.items()
                if isinstance(term, TermWithTeacher) and term.has_teacher
            }
        self.frozen_teachers = nn.ModuleDict(frozen)
        self.copy_student_to_teacher()
        self.teacher.requires_grad_(False)
        self._frozen_in_eval()
        if clashing := self.student.keys() & self.losses.keys():
            raise ValueError(f"losses.{min(clashing)} has the name of a network's module; give the term another.")
        # Named and shaped as Meta's, whose checkpoints hold them.
        self.dino_loss = Centering((1, class_prototypes))
        self.ibot_patch_loss = Centering((1, 1, patch_prototypes))
        self.kernels = EAGER
        # Whether the next batch is the last one of an optimiser step, see `begin_micro_batch`.
        self.completes_step = True
        # Of the newest batch, what each loss that has such a level would be if the student told nothing apart.
        self.chance: dict[str, Tensor] = {}
        # Whether figures of health are taken of the batch that completes the step; those of the newest one that they
        # were taken of, and the teacher's class tokens (B, D) of its first views.
        self.measures_health = False
        self.health: dict[str, Tensor] = {}
        self.class_tokens = torch.empty(0)

    def _network(self, backbone: nn.Module) -> nn.ModuleDict:
        network = nn.ModuleDict({"backbone": backbone})
        for name in ("dino", "ibot") if self.cfg.ibot.separate_head else ("dino",):
            head = getattr(self.cfg, name)
            network[f"{name}_head"] = DINOHead(
                self.embed_dim,
                head.head_n_prototypes,
                nlayers=head.head_nlayers,
                hidden_dim=head.head_hidden_dim,
                bottleneck_dim=head.head_bottleneck_dim,
            )
        return network

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.student.parameters()).device

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Modules that are optimised, by name: the student's modules, and terms with parameters of their own."""
        terms = {name: term for name, term in self.losses.items() if any(p.requires_grad for p in term.parameters())}
        return {**self.student, **terms}

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self._frozen_in_eval()
        return self

    def _frozen_in_eval(self) -> None:
        self.teacher.eval()
        self.frozen_teachers.eval()

    def copy_student_to_teacher(self) -> None:
        """Make the teacher, and frozen ones that follow it, equal to the student.

        Before `prepare_for_distributed_training`.
        """
        self.teacher.load_state_dict(self.student.state_dict())
        for frozen in self.frozen_teachers.values():
            if frozen.term.follows_teacher:
                frozen.backbone.load_state_dict(self.student.backbone.state_dict())

    def begin_step(self, step: int, epoch: float) -> None:
        """Make ready for a zero-based step, before its losses: replace frozen teachers where that is due."""
        for frozen in self.frozen_teachers.values():
            frozen.begin(step, epoch, self.teacher.backbone)

    def begin_micro_batch(self, completes_step: bool) -> None:
        """Make ready for a batch, before its losses, of the several whose gradients add up to an optimiser step's.

        Before the last one, centres of the teacher's targets stay, and gradients are not averaged over ranks but where
        ``FULL_SHARD`` asks for little memory.
        """
        if completes_step == self.completes_step:
            return
        self.completes_step = completes_step
        for name, module in self.trained.items():
            settings = getattr(self.cfg.compute_precision.student, name) if name in self.student else None
            if settings is None or settings.sharding_strategy != "FULL_SHARD":
                defer_reduction(module, not completes_step)

    def freeze_all_but_last_blocks(self, n: int) -> None:
        """Train only the last ``n`` backbone blocks, the final norm and the heads; 0 leaves all trainable.

        Raises ValueError if there are fewer than ``n`` blocks.
        """
        backbone = self.student.backbone
        if n > len(backbone.blocks):
            raise ValueError(
                f"train.unfreeze_last_n_blocks = {n} exceeds the {len(backbone.blocks)} blocks of "
                f"{self.cfg.student.arch}; use at most that, or 0 to train everything."
            )
        if n == 0:
            return
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(backbone.layer_of(name) > len(backbone.blocks) - n)

    def prepare_for_distributed_training(self, device: torch.device | None = None) -> None:
        """Move to ``device`` and, with more than one process, give every rank its shard of rank 0's weights.

        All ranks must call. Modules are sharded one by one, blocks gathered one at a time.
        """
        device = device or self.device
        if get_global_size() > 1:
            for role in ("student", "teacher"):
                for name, module in getattr(self, role).items():
                    self._distribute(module, getattr(getattr(self.cfg.compute_precision, role), name), device)
            for frozen in self.frozen_teachers.values():
                self._distribute(frozen.backbone, self.cfg.compute_precision.teacher.backbone, device)
            for name, term in self.losses.items():
                state = {key: value.clone() for key, value in term.state_dict().items()}
                if not state:
                    continue
                term.to(device)
                if name in self.trained:
                    fp32 = dict.fromkeys(("param_dtype", "reduce_dtype"), torch.float32)
                    shard(term, (), device=device, strategy="SHARD_GRAD_OP", **fp32)
                load_full_state_dict(term, state if is_main_process() else {})
        self.to(device)

    def _distribute(self, module: nn.Module, settings: Any, device: torch.device) -> None:
        """Shard a backbone or a head; its weights, and tables that were computed when it was built, are rank 0's."""
        state = module.state_dict()
        tables = broadcast_object({name: t.clone() for name, t in module.named_buffers() if name not in state})
        module.to("meta")
        shard(
            module,
            getattr(module, "blocks", ()),
            device=device,
            strategy=settings.sharding_strategy,
            param_dtype=DTYPES[settings.mixed_precision.param_dtype],
            reduce_dtype=DTYPES[settings.mixed_precision.reduce_dtype],
            prefetch=self.cfg.performance.prefetch_blocks,
        )
        module.to_empty(device=device)
        load_full_state_dict(module, state if is_main_process() else {})
        for name, value in tables.items():
            module.get_buffer(name).copy_(value)

    def get_params_groups(self) -> list[dict]:
        """Parameter groups of all that is `trained`; see `parameter_groups`."""
        return parameter_groups(self.trained, self.cfg.optim.layerwise_decay, self.cfg.optim.patch_embed_lr_mult)

    def compute_losses(
        self, batch: Mapping[str, Any], teacher_temp: float, epoch: float = math.inf
    ) -> dict[str, Tensor]:
        """The losses of one batch; all ranks must call. Of several that make a step, see `begin_micro_batch`.

        Args:
            batch: on the networks' device: normalised ``global_crops`` (2B, 3, S, S) and ``local_crops``
                (L*B, 3, s, s), view-major, and ``gram_crops`` (2B, 3, S', S') where the gram teacher sees others
                than the global ones; ``masks`` bool (2B, N); ``mask_indices`` (M,) and ``mask_weight`` (M,), 0 on
                padding; ``slides``, ``slide_ids`` and ``indices`` (B,) where a term asks for them.
            teacher_temp: temperature of the teacher's targets.
            epoch: position in the ramps of the weights, by default after them.

        Returns:
            0-d float32 tensors: ``total_loss``, the sum of all terms times their weights, and the terms,
            unweighted. A term of weight 0 is left out.
        """
        common = self._outputs(batch, teacher_temp)
        outputs = {name: self._with_frozen_tokens(name, common, batch) for name in self.losses}
        losses: dict[str, Tensor] = {}
        total: Tensor | int = 0
        self.chance = {}
        for name, term in self.losses.items():
            values = term(outputs[name])
            values = values if isinstance(values, dict) else {f"{name}_loss": values}
            total = total + sum(term.weight_of(loss, epoch) * value for loss, value in values.items())
            losses |= values
            self.chance |= {
                # A number is filled in on the device; copied there, it would wait.
                loss: level.detach() if isinstance(level, Tensor) else total.new_full((), level)
                for loss, level in term.chance(outputs[name]).items()
            }
        if self.measures_health and self.completes_step:
            self.health = health_of_targets(common, self.losses)
            for name, term in self.losses.items():
                self.health |= term.figures(outputs[name])
            self.class_tokens = common.teacher_class_tokens[0].clone()  # not a view, which would keep the others
        return {"total_loss": total, **losses}

    def _outputs(self, batch: Mapping[str, Any], teacher_temp: float) -> StepOutputs:
        """Run teacher and student, and make the targets."""
        crops, masks = [batch["global_crops"]], [batch["masks"]]
        with torch.no_grad():
            teacher = self._run(self.teacher, crops, [None], batch["mask_indices"])
            class_targets, patch_targets = self._targets(teacher, batch["mask_weight"], teacher_temp)
        if len(batch["local_crops"]):
            crops, masks = [*crops, batch["local_crops"]], [*masks, None]
        student = self._run(self.student, crops, masks, batch["mask_indices"])
        images = len(batch["global_crops"]) // _VIEWS

        def by_view(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.unflatten(0, (-1, images))

        return StepOutputs(
            class_tokens=by_view(student.class_tokens),
            teacher_class_tokens=by_view(teacher.class_tokens),
            class_logits=by_view(student.class_logits),
            class_targets=by_view(class_targets),
            patch_logits=student.patch_logits,
            patch_targets=patch_targets,
            **{name: batch[name] for name in ("masks", "mask_indices", "mask_weight")},
            teacher_temp=teacher_temp,
            kernels=self.kernels,
            patch_tokens=by_view(student.patch_tokens),
            teacher_patch_tokens=by_view(teacher.patch_tokens),
            slides=batch.get("slides", ()),
            slide_ids=batch.get("slide_ids"),
            indices=batch.get("indices"),
        )

    @torch.no_grad()
    def _with_frozen_tokens(self, name: str, outputs: StepOutputs, batch: Mapping[str, Any]) -> StepOutputs:
        """Outputs for a term, with tokens of its frozen teacher where it has one and its loss has a weight."""
        if name not in self.frozen_teachers or not self.frozen_teachers[name].is_active:
            return outputs
        frozen = self.frozen_teachers[name]
        with self._autocast(self.cfg.compute_precision.teacher.backbone):
            tokens = frozen.backbone([frozen.term.images(batch)], masks=[None], is_training=True)[0]
        return dataclasses.replace(
            outputs,
            frozen_class_tokens=tokens["x_norm_clstoken"].unflatten(0, (_VIEWS, -1)),
            frozen_patch_tokens=tokens["x_norm_patchtokens"].unflatten(0, (_VIEWS, -1)),
        )

    def _targets(self, teacher: _Outputs, mask_weight: Tensor, temp: float) -> tuple[Tensor, Tensor | Assignments]:
        """Probabilities of the global views' class tokens (V*B, K) and of the masked patches (M, K)."""
        row_weight = (mask_weight > 0).float()
        if self.cfg.train.centering == "sinkhorn_knopp":
            both, weights = [teacher.class_logits, teacher.patch_logits], [None, row_weight]
            of_classes, of_patches = sinkhorn_assignments_of(both, temp, 3, weights, self.kernels)
            factored = self.cfg.debug.factored_targets
            return of_classes.probs(), of_patches if factored else of_patches.probs()
        of_classes = self.dino_loss.probs(teacher.class_logits, temp)
        of_patches = self.ibot_patch_loss.probs(teacher.patch_logits, temp)
        self.dino_loss.update_center(teacher.class_logits, completes_step=self.completes_step)
        self.ibot_patch_loss.update_center(teacher.patch_logits, row_weight, self.completes_step)
        return of_classes, of_patches

    def _run(
        self, network: nn.ModuleDict, crops: list[Tensor], masks: list[Tensor | None], mask_indices: Tensor
    ) -> _Outputs:
        """Tokens and logits of one network for all crop sizes, the global views first."""
        debug, backbone = self.cfg.debug, network.backbone
        precision = getattr(self.cfg.compute_precision, "student" if network is self.student else "teacher")
        all_patches = any("patch_tokens" in term.needs for term in self.losses.values())
        prune = debug.prune_last_block and backbone.supports_patch_index and not all_patches
        passes = [(crops, masks)]
        if not debug.packed_crops:
            passes = [([crop], [mask]) for crop, mask in zip(crops, masks, strict=True)]
        outputs: list[dict[str, Tensor]] = []
        with self._autocast(precision.backbone):
            for crops_of_pass, masks_of_pass in passes:
                # Masked patches are those of the global views, which are in the first pass.
                selected = {"patch_index": mask_indices[:0] if outputs else mask_indices} if prune else {}
                outputs += backbone(crops_of_pass, masks=masks_of_pass, is_training=True, **selected)
        global_views = outputs[0]
        if prune:
            masked = global_views["x_norm_indexedtokens"]
        else:
            masked = global_views["x_norm_patchtokens"].flatten(0, 1).index_select(0, mask_indices)
        class_tokens = torch.cat([output["x_norm_clstoken"] for output in outputs])
        if "ibot_head" in network:
            with self._autocast(precision.dino_head):
                class_logits = network.dino_head(class_tokens)
            with self._autocast(precision.ibot_head):
                patch_logits = network.ibot_head(masked)
        else:  # a shared head sees both in one call
            with self._autocast(precision.dino_head):
                logits = network.dino_head(torch.cat([class_tokens, masked]))
            class_logits, patch_logits = logits.split([len(class_tokens), len(masked)])
        patch_tokens = global_views["x_norm_patchtokens"] if all_patches else None
        return _Outputs(global_views["x_norm_clstoken"], class_logits, patch_logits, patch_tokens)

    def _autocast(self, settings: Any) -> torch.autocast:
        dtype = DTYPES[settings.mixed_precision.param_dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def update_teacher(self, m: float, all_finite: Tensor | float = 1.0) -> None:
        """Move the teacher to the student: ``t <- m t + (1 - m) s`` unless ``all_finite`` is 0; see `ema_update`."""
        ema_update(self.student, self.teacher, (1 - m) * all_finite)

    def forward_backward(self, images: Mapping[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """DINOv2's public step; see `dinov2.compat.loss.forward_backward`."""
        return import_module("dinov2.compat.loss").forward_backward(self, images, teacher_temp)
