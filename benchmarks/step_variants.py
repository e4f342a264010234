"""The implementations that the step benchmark compares: how each is built, checked and measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference_packed, reference_separate
from benchmarks.gate import THRESHOLDS, GateResult, correctness
from benchmarks.reference_parts import EagerStep, StepSpec
from benchmarks.step_batches import Batch, Preset, host_batches, to_device
from benchmarks.step_phases import Mark, around_forward
from dinov2.configs import Config
from dinov2.train.performance.apply import build_training_step
from dinov2.train.performance.capabilities import resolve_performance
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.optim import ScheduleValues, build_optimizer
from dinov2.train.update.step import TrainingStep

VALUES = ScheduleValues(lr=1e-5, last_layer_lr=1e-5, wd=0.04, mom=0.994, teacher_temp=0.05)
SEED = 0
WEIGHT_NOISE = 2e-3  # a tenth of the deviation that linear maps start with
# A product of e4m3 operands is off by some percent, against some thousandths in bf16.
FP8_THRESHOLDS = {"max_loss_error": 5e-2, "min_cosine": 0.93, "max_norm_error": 0.1}


@dataclass(frozen=True)
class Variant:
    """An implementation.

    Attributes:
        overrides: of the preset's configuration, for ours.
        reference: class of an independent step; None: ours.
        separate: the reference computes dropped branches too, on the preset's ``separate_images``.
        predicted_ms: what the switch that is off was expected to save.
    """

    overrides: tuple[str, ...] = ()
    reference: type[EagerStep] | None = None
    separate: bool = False
    predicted_ms: tuple[float, float] | None = None


# Milliseconds (least, most) that each switch was expected to save of a step on an H200.
_PREDICTED_MS = {
    "performance.compile": (20.0, 100.0),
    "performance.fused_update": (24.0, 24.0),
    "debug.packed_crops": (10.0, 10.0),
    "debug.inverse_gather": (10.0, 10.0),
    "debug.factored_targets": (25.0, 25.0),
    "debug.prune_last_block": (7.0, 9.0),
    "debug.weight_copies": None,
}

VARIANTS = {
    "ref_packed": Variant(reference=reference_packed.ReferenceStep),
    "ref_sep": Variant(reference=reference_separate.ReferenceStep, separate=True),
    "ours_eager": Variant(tuple(f"{key}=false" for key in _PREDICTED_MS)),
    "ours_bf16": Variant(),
    "ours_fp8_teacher": Variant(("performance.fp8=teacher",)),
    "ours_fp8": Variant(("performance.fp8=all",)),
}
ABLATIONS = {
    **{
        key.partition(".")[2]: Variant((f"{key}=false",), predicted_ms=predicted)
        for key, predicted in _PREDICTED_MS.items()
    },
    **{
        f"attention_{backend}": Variant((f"student.attention_backend={backend}",))
        for backend in ("flash", "cudnn", "efficient", "math")
    },
}


class Ours:
    """Our step, as training builds it."""

    def __init__(self, config: Config, device: torch.device):
        self.arch = starting_arch(config, device)
        self._training_step = our_step(self.arch)
        self._made = 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Make one step; the losses and gradient norms, on the device. Nothing waits for it."""
        self._made += 1
        return self._training_step(self._made - 1, [batch], VALUES)

    def gradients(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and, by name, gradients; no update."""
        self._training_step.begin(0, VALUES)
        losses = self.arch.compute_losses(batch, VALUES.teacher_temp)
        self._training_step.backward(losses)
        named = self.arch.student.named_parameters()
        return losses, {name: p.grad for name, p in named if p.grad is not None}

    def staged_step(self, batch: Batch, mark: Mark) -> None:
        """Make one step, ending each phase."""
        arch, step = self.arch, self._training_step
        step.begin(self._made, VALUES)
        with (
            around_forward(arch.teacher.backbone, mark, "begin", "teacher_backbone"),
            around_forward(arch.student.backbone, mark, "teacher_heads_and_targets", "student_backbone"),
        ):
            losses = arch.compute_losses(batch, VALUES.teacher_temp)
        mark("student_heads_and_losses")
        step.backward(losses)
        mark("backward")
        step.update(self._made, losses, VALUES)
        mark("clip_optimizer_ema")
        self._made += 1


class Reference:
    """An independent step, on weights drawn as ours are."""

    def __init__(self, variant: Variant, config: Config, device: torch.device):
        arch = starting_arch(config, device)
        states = arch.student.state_dict(), arch.teacher.state_dict()
        self._step = variant.reference(step_spec(config, arch), *states, device)

    def step(self, batch: Batch) -> dict[str, Any]:
        """Make one step, waiting for the device where the original does; the losses."""
        return self._step.step(batch, VALUES.lr, VALUES.wd, VALUES.mom, VALUES.teacher_temp)

    def gradients(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and, by name, gradients; no update."""
        return reference_gradients(self._step, batch)


def build(variant: Variant, config: Config, device: torch.device) -> Ours | Reference:
    """The implementation, ready to step."""
    return Reference(variant, config, device) if variant.reference else Ours(config, device)


def check(variant: Variant, preset: Preset, device: torch.device) -> GateResult:
    """Compare losses and gradients with the fp32 reference: same weights and batch, no stochastic depth."""
    images = preset.gate_images
    config = preset.config(*variant.overrides, "student.drop_path_rate=0.0", f"train.batch_size_per_gpu={images}")
    batch = to_device(next(host_batches(config, images, device)), config, device)
    losses, gradients = build(variant, config, device).gradients(batch)
    arch = starting_arch(config, device)
    spec = dataclasses.replace(step_spec(config, arch), dtype="fp32")
    states = arch.student.state_dict(), arch.teacher.state_dict()
    reference = reference_packed.ReferenceStep(spec, *states, device)
    expected = reference_gradients(reference, batch)
    limits = FP8_THRESHOLDS if config.performance.fp8 != "none" else THRESHOLDS["bf16"]
    return correctness(losses, gradients, *expected, **limits)


def our_step(arch: SSLMetaArch) -> TrainingStep:
    """Training's step on these networks; what their configuration asks for and this machine lacks raises."""
    config, device = arch.cfg, arch.device
    performance = resolve_performance(config, device)
    optim = config.optim
    optimizer = build_optimizer(arch.get_params_groups(), (optim.adamw_beta1, optim.adamw_beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return build_training_step(arch, optimizer, scaler, performance, config.train.batch_size_per_gpu)


def reference_gradients(step: EagerStep, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and, by name, gradients of an independent step; no update."""
    losses = step.losses(batch, VALUES.teacher_temp)
    losses["total_loss"].backward()
    return losses, step.named_gradients()


def starting_arch(config: Config, device: torch.device) -> SSLMetaArch:
    """The networks with weights that depend on the configuration alone, the teacher's other than the student's.

    Noise on all of them takes biases off zero, which would hide what is done with them.
    """
    torch.manual_seed(SEED)
    arch = SSLMetaArch(config, weights_device=device)
    with torch.no_grad():
        for parameter in (*arch.student.parameters(), *arch.teacher.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_NOISE)
    arch.prepare_for_distributed_training(device)  # one process: moves the losses' state as well
    return arch


def step_spec(config: Config, arch: SSLMetaArch) -> StepSpec:
    """What the independent steps are told of the configuration."""
    backbone, dino, ibot, crops = arch.student.backbone, config.dino, config.ibot, config.crops
    last = "w3" if config.student.ffn_layer.startswith("swiglu") else "fc2"
    return StepSpec(
        embed_dim=backbone.embed_dim,
        depth=backbone.n_blocks,
        heads=backbone.num_heads,
        ffn=config.student.ffn_layer,
        ffn_dim=getattr(backbone.blocks[0].mlp, last).in_features,
        patch=config.student.patch_size,
        registers=config.student.num_register_tokens,
        drop_path=config.student.drop_path_rate,
        global_size=crops.global_crops_size,
        local_size=crops.local_crops_size,
        local_crops=crops.local_crops_number,
        prototypes=dino.head_n_prototypes,
        ibot_prototypes=ibot.head_n_prototypes,
        head_hidden_dim=dino.head_hidden_dim,
        head_layers=dino.head_nlayers,
        dino_bottleneck=dino.head_bottleneck_dim,
        ibot_bottleneck=ibot.head_bottleneck_dim,
        separate_ibot_head=ibot.separate_head,
        kde_weight=dino.kde_loss_weight,
        kde_kappa=dino.kde_kappa,
        clip=config.optim.clip_grad,
        patch_lr_factor=config.optim.patch_embed_lr_mult,
        dtype=config.compute_precision.student.backbone.mixed_precision.param_dtype,
    )
