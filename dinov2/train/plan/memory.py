"""Memory of one GPU, predicted before anything is allocated, and the batch that fits it."""

import bisect
from dataclasses import dataclass

import torch
from torch import nn

from dinov2.configs.schema import Config
from dinov2.distributed import all_reduce_min
from dinov2.layers.linear import Linear
from dinov2.train.plan.measure import Cost, StepCosts
from dinov2.utils.dtypes import DTYPES

USABLE = 0.92
"""Fraction of the free memory that ``auto`` plans for: the rest is for CUDA's and NCCL's own needs, for libraries'
workspaces and for chunks that the allocator cannot reuse."""

REFUSED = 1.15
"""A fixed batch is refused where its prediction exceeds the GPU's memory by this factor."""

_GIB = 2**30
# Batches between and beyond which activations grow linearly. Of tens of crops stochastic depth keeps whole numbers.
_MEASURED = (10, 30)
_REMEDIES = "performance.recompute = selective or full, more GPUs, or sharding_strategy = FULL_SHARD would lower it"


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one GPU, by what holds them."""

    weights: int  # fp32 student and teachers, this rank's shards
    moments: int  # AdamW's two
    copies: int  # low-precision weights: kept, gathered, or cast and saved by autograd
    gradients: int  # fp32, all present when the backward ends: this rank's shards, or those that accumulate
    saved: int  # what the student's forward leaves for the backward
    peak: int  # most that is allocated in forward and backward
    batch: int  # crops in float32, of this step and of the next
    accumulates: bool = False  # whether earlier micro-batches have left gradients when a backward begins

    @property
    def total(self) -> int:
        """The peak: where the backward begins, or where it ends, with all gradients and nothing else left."""
        states = self.weights + self.moments + self.copies + self.batch
        return states + self._largest + self.backward

    @property
    def _largest(self) -> int:
        return self.saved + self.gradients if self.accumulates else max(self.saved, self.gradients)

    @property
    def backward(self) -> int:
        """Memory of the backward beyond activations and gradients."""
        return self.peak - self.saved

    def describe(self) -> str:
        """Parts of the peak, in GiB, on one line."""
        parts = {"fp32 weights": self.weights, "moments": self.moments}
        parts |= {"low-precision weights": self.copies, "crops": self.batch}
        if self.accumulates:
            parts |= {"gradients": self.gradients, "activations": self.saved}
        else:
            parts["activations" if self.saved > self.gradients else "gradients"] = self._largest
        parts["backward"] = self.backward
        return ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())


class MemoryModel:
    """Memory of a configuration's step as a function of the batch; ``HYBRID_SHARD`` shards over ``gpus_per_node``.

    States are sums over parameters; activations are measured at two batch sizes and linear in between.
    """

    def __init__(self, costs: StepCosts, world_size: int = 1, gpus_per_node: int = 8):
        self._costs, self._world, self._node = costs, world_size, gpus_per_node

    def __call__(self, images: int) -> MemoryPrediction:
        """Predict the peak of a step on ``images`` images per process."""
        (few, less), (many, more) = ((n, self._costs.activations(n)) for n in _MEASURED)
        saved, peak = (
            max(round(a + (b - a) * (images - few) / (many - few)), 0)
            for a, b in ((less.saved, more.saved), (less.peak, more.peak))
        )
        return self._at(images, Cost(saved=saved, peak=peak))

    def exactly(self, images: int) -> MemoryPrediction:
        """Predict it from activations measured at this very batch."""
        return self._at(images, self._costs.activations(images))

    def largest_batch(self, available: int) -> int:
        """The largest even batch that is predicted to take at most ``available`` bytes; 0 where there is none."""
        pairs = range(1, 2**20)
        return 2 * bisect.bisect_right(pairs, available, key=lambda number: self(2 * number).total)

    def _at(self, images: int, activations: Cost) -> MemoryPrediction:
        config, student = self._costs.config, self._costs.student
        accumulation = config.optim.accumulation_steps
        weights = trained = gradients = 0
        over = {"NO_SHARD": 1, "HYBRID_SHARD": min(self._world, self._node)}  # ranks that split fp32 states
        for name, module in student.items():
            strategy = getattr(config.compute_precision.student, name).sharding_strategy
            shards = over.get(strategy, self._world)
            weights += 2 * 4 * _numel(module) // shards
            trained += _numel(module, trained_only=True) // shards
            # Before the last micro-batch they are whole, but where each one's are averaged, see `begin_micro_batch`.
            whole = accumulation > 1 and strategy != "FULL_SHARD"
            gradients += 4 * (_numel(module, trained_only=True) // (1 if whole else shards))
            if name == "backbone":
                weights += sum(4 * _numel(frozen) // shards for frozen in self._costs.frozen_teachers)
        # Two whole blocks' gradients before they are reduced.
        unreduced = 2 * 8 * max(map(_numel, student.backbone.blocks)) if self._world > 1 else 0
        crops = config.crops
        pixels = 2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
        pixels += 2 * (crops.gram_views_size or 0) ** 2
        return MemoryPrediction(
            weights=weights,
            moments=8 * trained,
            copies=self._copies(),
            gradients=gradients,
            saved=activations.saved,
            peak=activations.peak + unreduced,
            batch=2 * 4 * 3 * images * pixels * accumulation,
            accumulates=accumulation > 1,
        )

    def _copies(self) -> int:
        """Weights in the dtype of the matmuls, of all networks.

        One process: kept 16-bit copies of the blocks' matrices; without them the student's are cast and saved by
        autograd, the teacher's freed one by one. Several: what FSDP keeps gathered, for the backward that is, so not
        of frozen modules, and the few blocks that it gathers ahead.
        """
        config, total = self._costs.config, 0
        student = self._costs.student
        networks = [("student", student), ("teacher", student)]
        networks += [("teacher", {"backbone": backbone}) for backbone in self._costs.frozen_teachers]
        for role, network in networks:
            for name, module in network.items():
                settings = getattr(getattr(config.compute_precision, role), name)
                element = DTYPES[settings.mixed_precision.param_dtype].itemsize
                units = list(module.blocks) if name == "backbone" else []
                frozen = role == "teacher"
                if self._world == 1:
                    if element == 2 and (config.debug.weight_copies or not frozen):
                        linear = (m for unit in units for m in unit.modules() if isinstance(m, Linear))
                        total += element * sum(layer.weight.numel() for layer in linear)
                elif name == "backbone" or not frozen:
                    always = frozen or settings.sharding_strategy == "FULL_SHARD"
                    again = sorted(_numel(unit) for unit in units if always or not _numel(unit, trained_only=True))
                    ahead = 2 + config.performance.prefetch_blocks
                    total += element * (_numel(module) - sum(again[ahead:]))
        return total


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the fullest GPU of the run; None on a CPU. All ranks must call."""
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], dtype=torch.int64, device=device)
    return int(all_reduce_min(free))


def resolve_batch(config: Config, memory: MemoryModel, free: int | None) -> int:
    """Images per process: the configured number, or for ``auto`` the largest that `USABLE` memory holds.

    ``free`` are the bytes free on the GPU before anything is allocated; None without a GPU. Raises ValueError if it is
    ``auto`` and there is no GPU, or not even two images fit.
    """
    if (configured := config.train.batch_size_per_gpu) != "auto":
        return configured
    if free is None:
        raise ValueError(
            "train.batch_size_per_gpu = auto needs a GPU whose memory it can fill and there is none; give a "
            "number of images."
        )
    if not memory(2).peak:
        raise ValueError(
            "train.batch_size_per_gpu = auto needs a step whose activations can be measured; give a number of images."
        )
    batch = memory.largest_batch(int(USABLE * free))
    if not batch:
        raise ValueError(
            f"train.batch_size_per_gpu = auto finds no batch: 2 images are predicted to take "
            f"{_gib(memory(2).total)} GiB of the {_gib(free)} GiB free on the GPU; {_REMEDIES}."
        )
    return batch


def check_fits(images: int, memory: MemoryModel, free: int) -> str | None:
    """A sentence of warning where ``images`` per process are predicted not to fit ``free`` bytes; None where they are.

    Raises ValueError if the prediction exceeds the memory by more than `REFUSED`.
    """
    predicted = memory.exactly(images).total
    if predicted <= free:
        return None
    largest = memory.largest_batch(int(USABLE * free))
    fits = f"{largest} images would fit" if largest else "not even 2 images would fit"
    figures = f"{_gib(predicted)} GiB of the {_gib(free)} GiB free on the GPU"
    if predicted > REFUSED * free:
        raise ValueError(
            f"train.batch_size_per_gpu = {images} is predicted to take {figures}; {fits}, and {_REMEDIES}."
        )
    return f"A batch of {images} images is predicted to take {figures} and may not fit; {fits}."


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def _numel(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
