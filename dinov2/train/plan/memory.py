"""Memory of one GPU, predicted before anything is allocated, and the batch that fits it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dinov2.configs.schema import Config, ModulePrecisionConfig
from dinov2.distributed import all_reduce_min
from dinov2.train.plan.activations import (
    ELEMENT,
    block_temporaries,
    blocks_saved,
    ends_saved,
    loss_temporaries,
    pixels,
)
from dinov2.train.plan.flops import StepShape, linear_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch

USABLE = 0.92
"""Share of the free memory that ``auto`` plans for: the rest is for CUDA's and NCCL's own needs, for libraries'
workspaces and for pieces that the allocator cannot reuse."""

REFUSED = 1.15
"""A fixed batch is refused where its prediction exceeds the GPU's memory by this factor."""

_GIB = 2**30
_REMEDIES = (
    "performance.recompute = selective or full, more GPUs, or sharding_strategy = FULL_SHARD would lower it"
)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one GPU, by what holds them.

    Attributes:
        weights: fp32 student and teacher, this rank's shards.
        moments: AdamW's two.
        copies: weights in the dtype of the products: kept, gathered, or cast and saved by autograd.
        gradients: fp32, this rank's shards, all present when the backward ends.
        blocks: what the student's blocks save for the backward.
        ends: what patch embedding, final norm, heads and losses save, logits and targets included.
        loss_peak: further bytes while the loss is differentiated.
        block_peak: further bytes while a block is differentiated, the logits being freed.
        batch: crops in float32, of this step and of the next.
    """

    weights: int
    moments: int
    copies: int
    gradients: int
    blocks: int
    ends: int
    loss_peak: int
    block_peak: int
    batch: int

    @property
    def states(self) -> int:
        """What does not depend on the batch, gradients apart."""
        return self.weights + self.moments + self.copies

    @property
    def total(self) -> int:
        """The peak: where the backward begins, in its first block, or where it has left gradients alone."""
        start = self.blocks + self.ends + self.loss_peak
        return self.states + self.batch + max(start, self.blocks + self.block_peak, self.gradients)

    def describe(self) -> str:
        """What the peak consists of, in GiB, on one line."""
        parts = {
            "fp32 weights": self.weights,
            "moments": self.moments,
            "weights for products": self.copies,
            "blocks": self.blocks,
            "heads and losses": self.ends,
            "backward": self.total - self.states - self.batch - self.blocks - self.ends,
            "crops": self.batch,
        }
        if self.total == self.states + self.batch + self.gradients:
            parts = {
                name: parts[name] for name in ("fp32 weights", "moments", "weights for products", "crops")
            }
            parts["gradients"] = self.gradients
        return ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the fullest GPU of the run; None on a CPU. All ranks must call."""
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], dtype=torch.int64, device=device)
    return int(all_reduce_min(free))


def predict_memory(
    config: Config,
    student: nn.ModuleDict,
    images: int,
    world_size: int = 1,
    gpus_per_node: int = 8,
    compiled: bool = True,
) -> MemoryPrediction:
    """Predict the peak of a training step.

    In eager mode the saved bytes are those that autograd holds, to a few percent. Compiled, they are what the
    min-cut partitioner keeps of each block today: matrix products' inputs and outputs in 16 bit, one float32
    residual stream. Inductor may decide otherwise in another version, so that figure is an estimate.

    Args:
        config: validated configuration.
        student: may be on the meta device, with frozen parts marked.
        images: per process and step, even.
        world_size: processes.
        gpus_per_node: over which ``HYBRID_SHARD`` shards.
        compiled: blocks run through torch.compile.
    """
    shape = StepShape.of(config, images)
    precision, backbone = config.compute_precision.student, student.backbone
    weights = trained = 0
    for name, module in student.items():
        shards = _shards(getattr(precision, name), world_size, gpus_per_node)
        weights += 2 * 4 * _numel(module) // shards
        trained += _numel(module, trained_only=True) // shards
    blocks, recomputed = blocks_saved(config, backbone, shape, compiled)
    heads_gradient = 4 * (_numel(student, True) - _numel(backbone, True))
    whole_units = 2 * 8 * _numel(backbone.blocks[0]) if world_size > 1 else 0  # before gradients are reduced
    return MemoryPrediction(
        weights=weights,
        moments=8 * trained,
        copies=_copies(config, student, world_size),
        gradients=4 * trained,
        blocks=blocks,
        ends=ends_saved(config, student, shape),
        loss_peak=loss_temporaries(config, student, shape),
        block_peak=heads_gradient + whole_units + recomputed + block_temporaries(config, backbone, shape),
        batch=2 * 4 * pixels(config, shape),
    )


def largest_batch(predict: Callable[[int], int], available: int, multiple: int = 2) -> int:
    """The largest multiple of ``multiple`` whose prediction is at most ``available`` bytes; 0 where none is.

    Args:
        predict: bytes for a number of images, growing with it.
        available: bytes.
        multiple: granularity.
    """
    if predict(multiple) > available:
        return 0
    low, high = 1, 2
    while predict(high * multiple) <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predict(middle * multiple) <= available else (low, middle)
    return low * multiple


def resolve_batch(
    config: Config, world_size: int, device_memory: int | None, gpus_per_node: int = 8, compiled: bool = True
) -> int:
    """Images per process: the configured number, or for ``auto`` the largest that `USABLE` memory holds.

    Args:
        config: validated configuration.
        world_size: processes.
        device_memory: bytes free on the GPU before anything is allocated; None without a GPU.
        gpus_per_node: see `predict_memory`.
        compiled: see `predict_memory`.

    Raises:
        ValueError: ``auto`` without a GPU, or where not even two images fit.
    """
    if config.train.batch_size_per_gpu != "auto":
        return config.train.batch_size_per_gpu
    if device_memory is None:
        raise ValueError(
            "train.batch_size_per_gpu = auto needs a GPU whose memory it can fill and there is none; give an even "
            "number of images."
        )
    predict = _predictor(config, world_size, gpus_per_node, compiled)
    batch = largest_batch(predict, int(USABLE * device_memory))
    if not batch:
        raise ValueError(
            f"train.batch_size_per_gpu = auto finds no batch: 2 images are predicted to take {_gib(predict(2))} GiB "
            f"of the {_gib(device_memory)} GiB free on the GPU; {_REMEDIES}."
        )
    return batch


def check_fits(
    config: Config,
    images: int,
    world_size: int,
    device_memory: int,
    gpus_per_node: int = 8,
    compiled: bool = True,
) -> str | None:
    """A sentence of warning where a batch is predicted not to fit; None where it is.

    Args:
        config: validated configuration.
        images: per process and step.
        world_size: processes.
        device_memory: bytes free on the GPU before anything is allocated.
        gpus_per_node: see `predict_memory`.
        compiled: see `predict_memory`.

    Raises:
        ValueError: the prediction exceeds the memory by more than `REFUSED`.
    """
    predict = _predictor(config, world_size, gpus_per_node, compiled)
    predicted = predict(images)
    if predicted <= device_memory:
        return None
    largest = largest_batch(predict, int(USABLE * device_memory))
    fits = f"{largest} images would fit" if largest else "not even 2 images would fit"
    figures = f"{_gib(predicted)} GiB of the {_gib(device_memory)} GiB free on the GPU"
    if predicted > REFUSED * device_memory:
        raise ValueError(
            f"train.batch_size_per_gpu = {images} is predicted to take {figures}; {fits}, and {_REMEDIES}."
        )
    return f"A batch of {images} images is predicted to take {figures} and may not fit; {fits}."


def meta_student(config: Config) -> nn.ModuleDict:
    """The student without its weights, frozen parts marked."""
    with torch.device("meta"):
        arch = SSLMetaArch(config)
    arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)
    return arch.student


def _predictor(config: Config, world_size: int, gpus_per_node: int, compiled: bool) -> Callable[[int], int]:
    student = meta_student(config)
    return lambda images: predict_memory(config, student, images, world_size, gpus_per_node, compiled).total


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def _numel(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def _shards(settings: ModulePrecisionConfig, world_size: int, gpus_per_node: int) -> int:
    """Over how many ranks a module's fp32 states are split."""
    if settings.sharding_strategy == "NO_SHARD":
        return 1
    return min(world_size, gpus_per_node) if settings.sharding_strategy == "HYBRID_SHARD" else world_size


def _copies(config: Config, student: nn.ModuleDict, world_size: int) -> int:
    """Weights in the dtype of the products, of both networks.

    One process: kept 16-bit copies of the blocks' matrices; without them the student's are cast and saved by
    autograd, the teacher's freed one by one. Several: what FSDP keeps gathered, for the backward that is, so not
    of frozen modules, and the few blocks that it gathers ahead.
    """
    total = 0
    precision = config.compute_precision
    for network, kept in ((precision.student, True), (precision.teacher, config.debug.weight_copies)):
        for name, module in student.items():
            settings = getattr(network, name)
            element = ELEMENT[settings.mixed_precision.param_dtype]
            units = list(module.blocks) if name == "backbone" else []
            if world_size == 1:
                total += element * sum(map(linear_weights, units)) if kept and element == 2 else 0
                continue
            frozen = network is precision.teacher
            again = [
                unit
                for unit in units
                if frozen or settings.sharding_strategy == "FULL_SHARD" or not _numel(unit, True)
            ]
            transient = sorted(map(_numel, again))[2 + config.performance.prefetch_blocks :]
            total += element * (0 if frozen and name != "backbone" else _numel(module) - sum(transient))
    return total
