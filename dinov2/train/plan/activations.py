"""Bytes that the student's forward leaves for its backward, by part, and what the backward adds to them."""

from __future__ import annotations

from torch import nn

from dinov2.configs.schema import Config
from dinov2.train.plan.flops import StepShape, linear_weights, rows

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number in the dtype of the products."""

_TILES = 3 * 2**26  # temporaries of the passes over prototype logits

# Below: e bytes of an element in the products, D width, F hidden width, H heads, K kept rows, T rows of the stream.


def blocks_saved(config: Config, backbone: nn.Module, shape: StepShape, compiled: bool) -> tuple[int, int]:
    """What all blocks save, and what one that is recomputed in the backward saves there (0 without recompute)."""
    total = again = 0
    stream = 4 * backbone.embed_dim * rows(shape.segments)
    for i, block in enumerate(backbone.blocks):
        if not any(p.requires_grad for p in block.parameters()):
            continue  # frozen blocks come first, and nothing before them needs a gradient
        kept = rows(shape.kept(block.drop_path_rate))
        wanted = kept
        if config.debug.prune_last_block and i == len(backbone.blocks) - 1:
            wanted = shape.crops + shape.masked
        everything = _block(config, block, shape, kept, wanted, compiled)
        if config.performance.recompute == "none":
            total += everything
            continue
        again = max(again, everything)
        total += stream
        if config.performance.recompute == "selective":
            total += _products(config, block, kept, wanted)
    return total, again


def block_temporaries(config: Config, backbone: nn.Module, shape: StepShape) -> int:
    """Gradients inside one block's backward: the residual stream's twice, its rows' and its widest layer's."""
    e, width = _element(config, "backbone"), backbone.embed_dim
    kept = max(rows(shape.kept(block.drop_path_rate)) for block in backbone.blocks)
    hidden = max(_hidden(block)[0] for block in backbone.blocks)
    return 8 * width * rows(shape.segments) + kept * (16 * width + 4 * e * hidden)


def ends_saved(config: Config, student: nn.ModuleDict, shape: StepShape) -> int:
    """What patch embedding, final norm, heads and losses save."""
    backbone = student.backbone
    e = _element(config, "backbone")
    normed = shape.crops + shape.masked if config.debug.prune_last_block else rows(shape.segments)
    total = 4 * backbone.embed_dim * normed
    if e == 2 and backbone.patch_embed.proj.weight.requires_grad:
        total += e * pixels(config, shape)
    if "ibot_head" in student:
        total += _head(config, student, "dino_head", shape.crops)
        total += _head(config, student, "ibot_head", shape.masked)
    else:
        total += _head(config, student, "dino_head", shape.crops + shape.masked)
    cls_targets = 4 * (3 * shape.images) * student.dino_head.last_layer.weight_g.numel()
    return total + cls_targets + _target_element(config, student) * _patch_logits(student, shape)


def loss_temporaries(config: Config, student: nn.ModuleDict, shape: StepShape) -> int:
    """Further bytes while the masked patches' cross-entropy is differentiated: the logits' gradient, and tiles."""
    return _element(config, _patch_head(student)) * _patch_logits(student, shape) + _TILES


def pixels(config: Config, shape: StepShape) -> int:
    """Numbers in a batch of crops."""
    per_patch = 3 * config.student.patch_size**2
    return per_patch * sum(batch * n for (batch, _), n in zip(shape.segments, shape.patches, strict=True))


def _element(config: Config, module: str) -> int:
    return ELEMENT[getattr(config.compute_precision.student, module).mixed_precision.param_dtype]


def _hidden(block: nn.Module) -> tuple[int, int, int]:
    """F, and how many F wide matrices a feed-forward layer saves in eager mode and compiled."""
    if hasattr(block.mlp, "w12"):
        return (
            block.mlp.w3.in_features,
            4,
            3,
        )  # gate and value, silu(gate), product; compiled without the third
    if hasattr(block.mlp, "fc1"):
        return block.mlp.fc2.in_features, 2, 2
    return 0, 0, 0


def _block(config: Config, block: nn.Module, shape: StepShape, kept: int, wanted: int, compiled: bool) -> int:
    """Bytes that one block saves; ``wanted`` rows of it are projected and fed forward, ``kept`` are keys."""
    e, width = _element(config, "backbone"), block.attn.proj.in_features
    hidden, eager_matrices, compiled_matrices = _hidden(block)
    packed = len(shape.segments) > 1 and config.debug.packed_crops
    attended = 2 if packed or wanted != kept else 1  # per crop size, and joined for the projection
    scaled = not isinstance(block.ls1, nn.Identity)
    dropped = block.drop_path_rate > 0
    per_key = e * width * (1 + 3 + 1) + 4 * block.attn.num_heads
    if compiled:
        # Norms are recomputed from one residual stream, LayerScale from the products' 16-bit outputs.
        stream = rows(shape.segments) if config.debug.inverse_gather or not dropped else 2 * kept
        per_row = e * width * ((attended - 1) + 1 + 2 * scaled) + e * hidden * compiled_matrices
        return kept * per_key + wanted * per_row + 4 * width * stream
    per_key += 4 * width
    per_row = 4 * width + e * width * (1 + attended - 1) + e * hidden * eager_matrices
    per_row += 4 * width * 2 * scaled
    if dropped and not config.debug.inverse_gather:
        per_row += 4 * width * 2
    return kept * per_key + wanted * per_row


def _products(config: Config, block: nn.Module, kept: int, wanted: int) -> int:
    """Outputs of a block's matrix products and of its attention."""
    e, width = _element(config, "backbone"), block.attn.proj.in_features
    hidden, _, _ = _hidden(block)
    first = 2 * hidden if hasattr(block.mlp, "w12") else hidden
    per_key = e * 4 * width + 4 * block.attn.num_heads
    return kept * per_key + wanted * e * (2 * width + first)


def _head(config: Config, student: nn.ModuleDict, name: str, count: int) -> int:
    """What a head of ``count`` rows saves: inputs, hidden layers before and after GELU, weights, logits."""
    e, head = _element(config, name), student[name]
    prototypes, bottleneck = head.last_layer.weight_v.shape
    layers = [m for m in head.mlp.modules() if isinstance(m, nn.Linear)]
    widths = layers[0].in_features + 2 * sum(layer.out_features for layer in layers[:-1])
    saved = count * (e * (widths + bottleneck + prototypes) + 4 * bottleneck)
    saved += 4 * bottleneck * prototypes + (
        e * linear_weights(head) if e == 2 else 4 * bottleneck * prototypes
    )
    return saved


def _patch_head(student: nn.ModuleDict) -> str:
    return "ibot_head" if "ibot_head" in student else "dino_head"


def _patch_logits(student: nn.ModuleDict, shape: StepShape) -> int:
    return shape.masked * student[_patch_head(student)].last_layer.weight_g.numel()


def _target_element(config: Config, student: nn.ModuleDict) -> int:
    """Targets in factored form are the teacher's logits and two vectors; written out, they are float32."""
    if not config.debug.factored_targets or config.train.centering != "sinkhorn_knopp":
        return 4
    teacher = getattr(config.compute_precision.teacher, _patch_head(student))
    return ELEMENT[teacher.mixed_precision.param_dtype]
