"""Computation of a run's networks: low-precision weights, FP8, recomputation and compilation, as configured."""

from functools import partial

import torch
from torch import Tensor

from dinov2.distributed import get_global_size
from dinov2.layers.linear import keep_low_precision_weights, use_fp8
from dinov2.layers.recompute import compiled_and_recomputed
from dinov2.loss import compiled_kernels
from dinov2.train.frozen_teacher import FrozenTeacher
from dinov2.train.performance.capabilities import ResolvedPerformance
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.fused_update import FusedWeightUpdate
from dinov2.train.update.step import TrainingStep
from dinov2.train.update.weight_update import WeightUpdate
from dinov2.utils.dtypes import DTYPES


def build_training_step(
    arch: SSLMetaArch,
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    performance: ResolvedPerformance,
    global_batch: int,
) -> TrainingStep:
    """The step as section ``performance`` wants it, on networks that hold the weights they start from.

    They are sharded and on their device; the loss scaler may be enabled or not.
    """
    low_precision = accelerate(arch, performance.compile)
    update = FusedWeightUpdate if performance.fused_update else WeightUpdate
    networks = arch.trained, arch.teacher
    max_norm, seed = arch.cfg.optim.clip_grad, arch.cfg.train.seed
    return TrainingStep(arch, update(optimizer, *networks, max_norm, low_precision, scaler), global_batch, seed)


def accelerate(arch: SSLMetaArch, compile: bool) -> list[tuple[Tensor, Tensor]]:
    """Put section ``performance`` into effect, on networks that are on their device and sharded.

    State dicts stay as they are. What is compiled is compiled at its first call. Pairs of a weight and its
    low-precision weight are returned, which whoever changes the weight refreshes.

    Raises ValueError if the attention backend has no kernel here, or FP8 does not fit the widths.
    """
    performance = arch.cfg.performance
    compiler = None
    if compile:
        # Equal blocks share their graphs. Under rates of stochastic depth that rise linearly none are equal: every
        # block has one graph in the student, and those of student, teacher and last block come on top.
        limit = 8 + 2 * len(arch.student.backbone.blocks)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        compiler = partial(torch.compile, backend=arch.cfg.debug.compile_backend, fullgraph=True, dynamic=False)
        arch.kernels = compiled_kernels(arch.cfg.debug.compile_backend)
    low_precision: list[tuple[Tensor, Tensor]] = []
    for network in (arch.student, arch.teacher, *arch.frozen_teachers.values()):
        backbone, trained = network.backbone, network is arch.student
        role = "student" if trained else "teacher"
        dtype = DTYPES[getattr(arch.cfg.compute_precision, role).backbone.mixed_precision.param_dtype]
        backbone.check_kernels(dtype, arch.device)
        # Sharded weights are gathered in 16 bit anyway.
        if arch.cfg.debug.weight_copies and dtype != torch.float32 and get_global_size() == 1:
            pairs = keep_low_precision_weights(backbone, dtype)
            if isinstance(network, FrozenTeacher):
                network.low_precision = pairs  # which change when it is replaced, not at every step
            else:
                low_precision += pairs
        if performance.fp8 == "all" or (performance.fp8 == "teacher" and not trained):
            use_fp8(backbone.blocks, performance.fp8_scaling, backward=trained)
        recompute = performance.recompute if trained else "none"
        for block in backbone.blocks:
            # The method, not the module: FSDP's hooks stay outside.
            block.forward = compiled_and_recomputed(block.forward, recompute, compiler)
        if compiler:
            heads = [(head, "forward") for part, head in network.named_children() if part != "backbone"]
            for module, name in [*((backbone, name) for name in backbone.compiled_methods), *heads]:
                setattr(module, name, compiler(getattr(module, name)))
    return low_precision
