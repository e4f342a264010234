"""FLOPs and bytes of one training step, measured on tensors without values: any backbone, any loss.

The step of a configuration runs once, forward and backward, under `FakeTensorMode` on the CPU, where nothing is
computed or allocated, and every operation reports its shapes. Blocks of equal shape cost the same, so that one of
each kind runs and the others pass their input on; the cost of a kind is measured beside the step, by a second run of
the block on the input that it has there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from dinov2.configs import Config
from dinov2.data.augment.masking import StratifiedMasks
from dinov2.distributed import single_process
from dinov2.layers.linear import keep_low_precision_weights
from dinov2.layers.recompute import compiled_and_recomputed
from dinov2.models import build_model_from_cfg
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.dtypes import DTYPES

logger = logging.getLogger("dinov2")

_ATEN = torch.ops.aten
# Older versions of PyTorch do not count the attention of a CPU.
_COUNTED_AS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
# Inductor's choice of what a graph keeps for its backward, without its code generation.
_PARTITIONER = "aot_eager_decomp_partition"


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one step, or micro-batch, on one process; (n, a) by (a, b) counts 2nab.

    Attributes:
        model: what the method asks for, the figure for model FLOPs utilisation. The switches that change what is
            executed are plain: ``prune_last_block`` and ``recompute`` are off, and attention keeps its scores
            (backend ``math``), so that training is three forward passes of the samples that stochastic depth keeps.
        hardware: what is executed: attention's backward recomputes its scores (2.5 forward passes in place of 2),
            the last block is pruned and the forward repeated where the configuration says so.
        dense: `model` without stochastic depth, for comparison with code that computes every sample.
    """

    model: int
    hardware: int
    dense: int

    def __mul__(self, times: int) -> StepFlops:
        return StepFlops(times * self.model, times * self.hardware, times * self.dense)


@dataclass(frozen=True)
class Cost:
    """Cost of a step or a block, forward and backward."""

    flops: int = 0
    saved: int = 0  # bytes that the forward leaves for the backward
    peak: int = 0  # bytes allocated at most, gradients included; weights, their copies and the batch are not


class StepCosts:
    """Costs of a validated configuration's training step; each is measured when first asked for.

    Where blocks are ``compiled``, they save what Inductor's min-cut partitioner keeps in this version of PyTorch. Heads
    and losses are measured in eager mode.
    """

    attention_backend = "sdpa"  # PyTorch's choice: on a CPU it saves what the fused kernels of a GPU do

    def __init__(self, config: Config, compiled: bool = False):
        self.config, self.compiled = config, compiled
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._steps: dict[int, tuple[Cost, Cost]] = {}

    @property
    def student(self) -> nn.ModuleDict:
        """The student without its weights, frozen parts marked."""
        return self._arch.student

    @property
    def frozen_teachers(self) -> list[nn.Module]:
        """Backbones of the terms' frozen teachers without their weights."""
        return [frozen.backbone for frozen in self._arch.frozen_teachers.values()]

    @property
    def saved_teachers(self) -> list[nn.Module]:
        """Those of them that checkpoints hold."""
        return [f.backbone for f in self._arch.frozen_teachers.values() if f.term.follows_teacher]

    def flops(self, images: int) -> StepFlops:
        """Count a step on ``images`` images."""
        whole, blocks = self._step(images)
        plain = dataclasses.replace(self.config.student, attention_backend="math")
        model, dense = (
            whole.flops - blocks.flops + self._plain_blocks(dataclasses.replace(self.config, student=student), images)
            for student in (plain, dataclasses.replace(plain, drop_path_rate=0.0))
        )
        return StepFlops(model, whole.flops, dense)

    def activations(self, images: int) -> Cost:
        """Measure `Cost.saved` and `Cost.peak` of a step on ``images`` images."""
        return self._step(images)[0]

    @cached_property
    def _arch(self) -> SSLMetaArch:
        """The networks as training computes them, on tensors without values."""
        config = self.config
        student = dataclasses.replace(config.student, attention_backend=self.attention_backend)
        with torch.device("meta"):
            arch = SSLMetaArch(dataclasses.replace(config, student=student)).train()
        arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)
        compiler = partial(torch.compile, backend=_PARTITIONER, fullgraph=True, dynamic=False)
        with self._mode:
            arch.to_empty(device="cpu")
            precision = config.compute_precision
            networks = [(arch.student, precision.student), (arch.teacher, precision.teacher)]
            networks += [(frozen, precision.teacher) for frozen in arch.frozen_teachers.values()]
            for network, precision in networks:
                dtype = precision.backbone.mixed_precision.param_dtype
                if dtype != "fp32":
                    keep_low_precision_weights(network.backbone, DTYPES[dtype])
            for block in arch.student.backbone.blocks:
                block.forward = compiled_and_recomputed(
                    block.forward, config.performance.recompute, compiler if self.compiled else None
                )
        return arch

    def _step(self, images: int) -> tuple[Cost, Cost]:
        """Cost of the whole step, and of all its blocks."""
        if images in self._steps:
            return self._steps[images]
        arch, limit = self._arch, 8 + 2 * len(self._arch.student.backbone.blocks)
        with single_process(), self._mode, torch._dynamo.config.patch(recompile_limit=limit):
            try:
                self._steps[images] = self._measure(arch, fake_batch(self.config, images))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                logger.warning(
                    "A loss or the backbone reads values of its tensors (%s), which makes the step wait for the "
                    "device and unmeasurable: the plan counts FLOPs of the blocks alone, and no activations.",
                    " ".join(str(error).split()),
                )
                self._steps[images] = Cost(), Cost()
        if self.compiled:
            torch.compiler.reset()  # graphs of tensors without values are of no further use
        return self._steps[images]

    def _measure(self, arch: SSLMetaArch, batch: dict[str, Any]) -> tuple[Cost, Cost]:
        backbones = [arch.student.backbone, arch.teacher.backbone, *self.frozen_teachers]
        with Meter((arch, batch)) as meter, one_of_each_kind(meter, *backbones) as costs:
            loss = arch.compute_losses(batch, 0.07)["total_loss"]  # no cost depends on the temperature
            saved = meter.live
            loss.backward()
        arch.zero_grad(set_to_none=True)
        more = _total([(count - 1, cost) for count, cost in costs])
        # Whenever the peak is, the student's blocks hold what they saved: it begins to go with the last one.
        return Cost(meter.flops + more.flops, saved + more.saved, meter.peak + more.saved), _total(costs)

    def _plain_blocks(self, config: Config, images: int) -> int:
        """FLOPs of all blocks of a step; other parts of it do not depend on the switches."""
        with torch.device("meta"):
            student, teacher, _ = build_model_from_cfg(config)
        for ours, plain in zip(self.student.backbone.parameters(), student.parameters(), strict=True):
            plain.requires_grad_(ours.requires_grad)
        with self._mode:
            networks = [network.to_empty(device="cpu") for network in (student.train(), teacher.eval())]
            batch = fake_batch(config, images)
            crops = [batch[name] for name in ("global_crops", "local_crops") if len(batch[name])]
            frozen = self._arch.frozen_teachers.values()
            backbones = student, teacher, *self.frozen_teachers
            with Meter(([*networks, *frozen], batch)) as meter, one_of_each_kind(meter, *backbones) as costs:
                student(crops, masks=[batch["masks"], None][: len(crops)], is_training=True)
                with torch.no_grad():
                    teacher(crops[:1], masks=[None], is_training=True)
                    for each in frozen:
                        each.backbone([each.term.images(batch)], masks=[None], is_training=True)
        return _total(costs).flops


def fake_batch(config: Config, images: int) -> dict[str, Any]:
    """A batch of the shapes that a configuration gives ``images`` images; see `MultiCropCollate`."""
    crops, ibot = config.crops, config.ibot
    side = crops.global_crops_size // config.student.patch_size
    draw = StratifiedMasks(0, (side, side), ibot.mask_sample_probability, ibot.mask_ratio_min_max)
    masked = draw.bound(images)

    def views(number: int, size: int) -> Tensor:
        return torch.empty(number * images, 3, size, size)

    gram_size = crops.gram_views_size
    return {
        "global_crops": views(2, crops.global_crops_size),
        **({"gram_crops": views(2, gram_size)} if gram_size else {}),
        "local_crops": views(crops.local_crops_number, crops.local_crops_size),
        "masks": torch.zeros(2 * images, side**2, dtype=torch.bool),
        "mask_indices": torch.zeros(masked, dtype=torch.int64),
        "mask_weight": torch.zeros(masked),
        "n_masked": torch.zeros((), dtype=torch.int64),
        "indices": torch.zeros(images, dtype=torch.int64),
        "slides": ["slide"] * images,
        "slide_ids": torch.zeros(images, dtype=torch.int64),
    }


@contextlib.contextmanager
def one_of_each_kind(meter: Meter, *networks: nn.Module) -> Iterator[list[tuple[int, Cost]]]:
    """While open, only one block of each kind runs, and the last one; the others return their first argument.

    Class, parameters and rate of stochastic depth tell the kinds. For each block that ran, of any network, the number
    of those like it and what one costs are listed.
    """
    costs: list[tuple[int, Cost]] = []
    with contextlib.ExitStack() as undo:
        for network in networks:
            kinds = [
                (type(b), getattr(b, "drop_path_rate", 0.0), *((n, p.shape, p.requires_grad) for n, p in parameters))
                for b, parameters in ((block, block.named_parameters()) for block in network.blocks[:-1])
            ]
            # The last of its kind, so that gradients go through its input where they do in most.
            runs = {kind: i for i, kind in enumerate(kinds)}
            counts = {i: kinds.count(kind) for kind, i in runs.items()} | {len(kinds): 1}
            for i, block in enumerate(network.blocks):
                if i in counts:

                    def measure(block: nn.Module, args: Any, kwargs: Any, _: Any, count: int = counts[i]) -> None:
                        costs.append((count, meter.alone(block, args, kwargs)))

                    undo.callback(block.register_forward_hook(measure, with_kwargs=True).remove)
                else:
                    undo.callback(setattr, block, "forward", block.forward)
                    block.forward = _passing_on(block)
        yield costs


class Meter(TorchDispatchMode):
    """Counts FLOPs of the operations under it, and bytes of the storages that they allocate and free.

    Modules and tensors that are ``known``, in any nesting of lists and dicts, exist already.
    """

    def __init__(self, known: Any):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._storages: set[int] = set()
        for entry in tree_leaves(known):
            tensors = [*entry.parameters(), *entry.buffers()] if isinstance(entry, nn.Module) else [entry]
            self._storages |= {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Leave torch.compile on."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(_COUNTED_AS.get(func.overloadpacket, func.overloadpacket))
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._allocate(tensor.untyped_storage())
        return out

    def alone(self, block: nn.Module, args: Any, kwargs: Any) -> Cost:
        """Run a block on these arguments once more, forward and backward, and return what that takes."""
        flops, live, peak = self.flops, self.live, self.peak
        # A copy of the input, so that it counts where the block saves it, and no leaf, which the graph would hold.
        inputs = tree_map_only(Tensor, _copy, (args, kwargs))
        out = block.forward(*inputs[0], **inputs[1])
        scalar = out.sum()
        del inputs, out
        saved = 0
        if scalar.requires_grad:
            saved = self.live - live
            scalar.backward()
            block.zero_grad(set_to_none=True)
        cost = Cost(self.flops - flops, saved)
        self.flops, self.peak = flops, peak
        return cost

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


def _copy(argument: Tensor) -> Tensor:
    if not argument.is_floating_point():
        return argument
    return argument.detach().requires_grad_(argument.requires_grad).clone()


def _passing_on(block: nn.Module) -> Callable[..., Tensor]:
    """Stand-in for a block that does not run."""
    is_trained = any(p.requires_grad for p in block.parameters())

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if is_trained and torch.is_grad_enabled() and not x.requires_grad:
            return x.detach().requires_grad_()  # the first trained block above frozen ones
        return x

    return forward


def _total(costs: Sequence[tuple[int, Cost]]) -> Cost:
    return Cost(sum(n * cost.flops for n, cost in costs), sum(n * cost.saved for n, cost in costs))
