"""Arithmetic of one training step: what the method asks for, what is executed, and what it would be without
stochastic depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dinov2.configs.schema import Config


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one step on one process; a product of (n, a) by (a, b) counts 2nab.

    Attributes:
        model: what the method asks for, the figure for model FLOPs utilisation: training is three forward passes
            of the samples that stochastic depth keeps. No switch changes it.
        hardware: what is executed: attention's backward recomputes its scores (2.5 forward passes in place of 2),
            the last block is pruned and the forward repeated where the configuration says so.
        dense: `model` without stochastic depth, for comparison with code that computes every sample.
    """

    model: int
    hardware: int
    dense: int


@dataclass(frozen=True)
class StepShape:
    """Sizes of one step on one process.

    Attributes:
        images: of the batch.
        segments: (crops, tokens per crop) of the global and, if any, the local crops.
        patches: patches per crop, in the same order.
        masked: rows of the padded index of masked patches.
    """

    images: int
    segments: tuple[tuple[int, int], ...]
    patches: tuple[int, ...]
    masked: int

    @classmethod
    def of(cls, config: Config, images: int) -> StepShape:
        """The sizes that a configuration gives a batch of ``images``, an even number."""
        crops, ibot = config.crops, config.ibot
        sizes = ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
        patches = tuple((size // config.student.patch_size) ** 2 for number, size in sizes if number)
        extra = 1 + config.student.num_register_tokens
        numbers = (number for number, _ in sizes if number)
        segments = tuple((number * images, n + extra) for number, n in zip(numbers, patches, strict=True))
        low, high = ibot.mask_ratio_min_max
        parts = round(4 * ibot.mask_sample_probability)
        edges = (low + (high - low) * (part + 1) / parts for part in range(parts))
        return cls(images, segments, patches, images // 2 * sum(int(patches[0] * edge) for edge in edges))

    @property
    def global_segment(self) -> tuple[tuple[int, int], ...]:
        """What the teacher sees."""
        return self.segments[:1]

    @property
    def crops(self) -> int:
        """Crops, and so class tokens, of the student."""
        return sum(batch for batch, _ in self.segments)

    def kept(self, drop_rate: float) -> tuple[tuple[int, int], ...]:
        """The segments that a residual branch computes under stochastic depth."""
        return tuple((max(int(batch * (1 - drop_rate)), 1), tokens) for batch, tokens in self.segments)


def rows(segments: tuple[tuple[int, int], ...]) -> int:
    """Packed rows of segments."""
    return sum(batch * tokens for batch, tokens in segments)


def step_flops(config: Config, student: nn.ModuleDict, images: int) -> StepFlops:
    """Count one step.

    Counted are linear maps, attention, the patch embedding and every padded masked row of the heads. Frozen blocks
    count one forward pass.

    Args:
        config: the run's configuration.
        student: ``backbone``, ``dino_head`` and, where separate, ``ibot_head``; may be on the meta device.
        images: images of the step on one process.
    """
    shape = StepShape.of(config, images)
    shared = _heads(student, shape) + _patch_embedding(config, student.backbone, shape)
    model = dense = hardware = shared
    for block, pruned in _blocks(config, student.backbone):
        trained = any(p.requires_grad for p in block.parameters())
        kept, products = shape.kept(block.drop_path_rate), linear_weights(block)
        width = student.backbone.embed_dim
        passes = 3 if trained else 1
        teacher = _forward(products, width, shape.global_segment)
        model += passes * _forward(products, width, kept) + teacher
        dense += passes * _forward(products, width, shape.segments) + teacher
        again = 1 if trained and config.performance.recompute == "full" else 0
        wanted = shape.crops + shape.masked if pruned else None
        linear = _linear(block, kept, wanted)
        hardware += (passes + again) * linear
        hardware += (7 + 2 * again if trained else 2) * _attention(width, kept) // 2
        wanted = shape.global_segment[0][0] + shape.masked if pruned else None
        hardware += _linear(block, shape.global_segment, wanted) + _attention(width, shape.global_segment)
    return StepFlops(model, hardware, dense)


def flops_per_step(config: Config, student: nn.ModuleDict, images: int) -> int:
    """`StepFlops.model` of a step on ``images`` images."""
    return step_flops(config, student, images).model


def linear_weights(module: nn.Module) -> int:
    """Entries of all weight matrices that rows of tokens are multiplied by."""
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and "weight_g" not in name)


def _blocks(config: Config, backbone: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Every block, and whether only the rows that a loss reads are computed of it."""
    last = len(backbone.blocks) - 1
    for i, block in enumerate(backbone.blocks):
        yield block, config.debug.prune_last_block and i == last


def _forward(products: int, width: int, segments: tuple[tuple[int, int], ...]) -> int:
    return 2 * products * rows(segments) + _attention(width, segments)


def _attention(width: int, segments: tuple[tuple[int, int], ...]) -> int:
    return 4 * width * sum(batch * tokens**2 for batch, tokens in segments)


def _linear(block: nn.Module, segments: tuple[tuple[int, int], ...], wanted: int | None) -> int:
    """Linear maps of one forward pass; of a pruned block all rows are keys, ``wanted`` rows the rest."""
    everything = linear_weights(block)
    if wanted is None:
        return 2 * everything * rows(segments)
    keys = linear_weights(block.attn.qkv)
    return 2 * (keys * rows(segments) + (everything - keys) * wanted)


def _heads(student: nn.ModuleDict, shape: StepShape) -> int:
    ibot_head = student["ibot_head" if "ibot_head" in student else "dino_head"]
    passes_of_cls = 3 * shape.crops + shape.global_segment[0][0]
    return 2 * (
        linear_weights(student["dino_head"]) * passes_of_cls + linear_weights(ibot_head) * 4 * shape.masked
    )


def _patch_embedding(config: Config, backbone: nn.Module, shape: StepShape) -> int:
    """Student forward and weight gradient (pixels need none), teacher forward."""
    per_patch = 2 * 3 * config.student.patch_size**2 * backbone.embed_dim
    passes = 2 if backbone.patch_embed.proj.weight.requires_grad else 1
    student = sum(batch * n for (batch, _), n in zip(shape.segments, shape.patches, strict=True))
    return per_patch * (passes * student + shape.global_segment[0][0] * shape.patches[0])
