"""Measured FLOPs and bytes against arithmetic written out, PyTorch's counter and what autograd really saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import dinov2
from dinov2.configs import Config, load_config
from dinov2.distributed import get_global_size
from dinov2.layers.linear import keep_low_precision_weights
from dinov2.layers.recompute import compiled_and_recomputed
from dinov2.models.vision_transformer import vit_giant2
from dinov2.train.plan.measure import StepCosts, fake_batch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.batches import random_batch
from tests.helpers.runs import TINY

RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"
DEPTH, WIDTH, HIDDEN = 40, 1536, 4096
GLOBAL_TOKENS, LOCAL_TOKENS = 256 + 5, 49 + 5
IMAGES = 48
MASKED = 24 * (int(256 * 0.275) + int(256 * 0.45))
SIMILARITIES = 2 * 3 * 2 * IMAGES**2 * WIDTH  # of the KDE regulariser, forward and backward, per global view
BF16 = tuple(
    f"compute_precision.student.{module}.mixed_precision.param_dtype=bf16"
    for module in ("backbone", "dino_head", "ibot_head")
)


@pytest.fixture(scope="module")
def giant() -> StepCosts:
    return StepCosts(load_config(RECIPE, ["debug.prune_last_block=false"]))


def attention(num_global: int, num_local: int) -> int:
    return 4 * WIDTH * (num_global * GLOBAL_TOKENS**2 + num_local * LOCAL_TOKENS**2)


def heads(rows_cls: int, rows_patches: int) -> int:
    """One forward pass of both heads: three layers of 2048 and a bottleneck of 384 or 256 onto 131,072 prototypes."""
    weights = [WIDTH * 2048 + 2048**2 + 2048 * z + z * 131_072 for z in (384, 256)]
    assert [2 * w for w in weights] == [116_916_224, 82_837_504]
    return 2 * (weights[0] * rows_cls + weights[1] * rows_patches)


def other_parts() -> int:
    """Of a step: heads, patch embedding (pixels need no gradient) and the regulariser."""
    pixels = 2 * 588 * WIDTH * (2 * (96 * 256 + 384 * 49) + 96 * 256)
    return 3 * heads(480, MASKED) + heads(96, MASKED) + pixels + SIMILARITIES


@pytest.mark.parametrize(("drop_path", "kept", "teraflops"), [(0.4, (57, 230), 62.9), (0.0, (96, 384), 105.6)])
def test_student_forward(drop_path, kept, teraflops):
    """Stochastic depth saves what it should, packing costs nothing."""
    with torch.device("meta"):
        model = vit_giant2(
            patch_size=14,
            num_register_tokens=4,
            init_values=1e-5,
            ffn_layer="swiglufused",
            drop_path_rate=drop_path,
            drop_path_uniform=True,
            interpolate_antialias=True,
            interpolate_offset=0.0,
        )
        crops = [torch.empty(96, 3, 224, 224), torch.empty(384, 3, 98, 98)]
        masks = [torch.zeros(96, 256, dtype=torch.bool), None]
    with FlopCounterMode(display=False) as counter:
        model(crops, masks=masks, is_training=True)
    patches = 2 * 3 * 14**2 * WIDTH * (96 * 256 + 384 * 49)
    tokens = kept[0] * GLOBAL_TOKENS + kept[1] * LOCAL_TOKENS
    forward = DEPTH * (2 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) * tokens + attention(*kept))
    assert counter.get_total_flops() - patches == forward
    assert forward / 1e12 == pytest.approx(teraflops, abs=0.05)


def test_flops_of_the_full_recipe(giant):
    """57 and 230 kept samples, 4096-wide SwiGLU, 185 masked rows per pair of images."""
    linear = 2 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    assert linear == 56_623_104
    flops = giant.flops(IMAGES)
    teacher = DEPTH * (linear * 25_056 + attention(96, 0))
    student = DEPTH * (3 * linear * 27_297 + 3 * attention(57, 230))
    assert flops.model == student + teacher + other_parts()
    assert flops.model == pytest.approx(249e12, rel=0.003)  # the published accounting has 3,402 masked rows
    dense = DEPTH * (3 * linear * 45_792 + 3 * attention(96, 384))
    assert flops.dense == dense + teacher + other_parts()
    # 249.2 and 377.1 TFLOP are published for bottlenecks of 384 and 3,402 masked rows; the bound here is 4,440.
    wider = 4 * (3402 * 116_916_224 - MASKED * 82_837_504)
    assert (flops.model + wider) / 1e12 == pytest.approx(249.2, abs=0.05)
    assert (flops.dense + wider) / 1e12 == pytest.approx(377.1, abs=0.06)
    # Attention's backward takes 2.5 forward passes.
    assert flops.hardware == flops.model + DEPTH * attention(57, 230) // 2
    assert flops.hardware - SIMILARITIES == 249_602_755_928_064


def test_pruning_leaves_out_all_but_the_keys_of_unread_rows(giant):
    pruned = StepCosts(load_config(RECIPE)).activations(IMAGES).flops
    rest = 2 * (WIDTH**2 + 3 * WIDTH * HIDDEN)
    rows = 3 * (27_297 - 480 - MASKED) + 25_056 - 96 - MASKED
    assert giant.activations(IMAGES).flops - pruned == rest * rows


def test_switches_change_only_what_is_executed():
    plain, *others = (
        StepCosts(load_config(None, [*TINY, *overrides])).flops(4)
        for overrides in ((), ("performance.recompute=full",), ("debug.prune_last_block=false",))
    )
    assert all((other.model, other.dense) == (plain.model, plain.dense) for other in others)
    assert all(other.hardware > plain.hardware for other in others)


def test_frozen_blocks_and_no_local_crops():
    config = load_config(RECIPE, ["train.unfreeze_last_n_blocks=10", "crops.local_crops_number=0"])
    frozen = StepCosts(config).flops(2)
    kept, forward = 2, 56_623_104 * 261 + 4 * WIDTH * 261**2
    two_heads = 116_916_224 * (3 * 4 + 4) + 82_837_504 * 4 * 185
    pixels = 2 * 588 * WIDTH * 4 * 256 * 2
    similarities = 2 * 3 * 2 * 2**2 * WIDTH
    blocks = (30 + 3 * 10) * kept * forward + DEPTH * 4 * forward
    assert frozen.model == blocks + two_heads + pixels + similarities


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.drop_path_rate=0.3", "student.drop_path_uniform=false"),
        ("performance.recompute=full", "student.ffn_layer=swiglufused"),
        ("ibot.separate_head=false", "train.centering=centering"),
    ],
    ids=["plain", "a-kind-per-block", "recomputed", "shared-head"],
)
def test_executed_flops_equal_those_of_a_real_step(overrides):
    """PyTorch's counter over every block, computing; attention by products, which it counts in every version."""
    config = load_config(None, [*TINY, "student.attention_backend=math", *overrides])
    arch, counter = prepared(config), FlopCounterMode(display=False)
    with counter:
        arch.compute_losses(random_batch(config, 8), 0.07)["total_loss"].backward()
    costs = StepCosts(config)
    costs.attention_backend = "math"
    assert costs.flops(8).hardware == counter.get_total_flops()


class Saved:
    """Bytes of the distinct storages that autograd saves, those of ``known`` apart."""

    def __init__(self, arch: nn.Module, batch: dict[str, Any]):
        self.storages: dict[int, torch.UntypedStorage] = {}
        known = [
            *arch.parameters(),
            *arch.buffers(),
            *(x for x in batch.values() if isinstance(x, torch.Tensor)),
        ]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self.storages[storage._cdata] = storage  # kept alive, so that no address is used twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def prepared(config: Config, compiled: bool = False) -> SSLMetaArch:
    """Networks as training computes them, but for heads and losses, which are never compiled here."""
    arch = SSLMetaArch(config).train()
    arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)
    if config.compute_precision.student.backbone.mixed_precision.param_dtype == "bf16":
        keep_low_precision_weights(arch.student.backbone, torch.bfloat16)

    def compiler(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)

    for block in arch.student.backbone.blocks:
        block.forward = compiled_and_recomputed(
            block.forward, config.performance.recompute, compiler if compiled else None
        )
    return arch


def bytes_saved_by_a_step(config: Config, images: int, compiled: bool = False) -> int:
    """By autograd, on real tensors."""
    arch, batch = prepared(config, compiled), random_batch(config, images)
    saved = Saved(arch, batch)
    torch.compiler.reset()
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        arch.compute_losses(batch, 0.07)
    return saved.bytes


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        BF16,
        ("student.ffn_layer=swiglufused", *BF16),
        ("student.drop_path_rate=0",),
        ("crops.local_crops_number=0",),
        ("ibot.separate_head=false",),
        ("train.unfreeze_last_n_blocks=2",),
        ("performance.recompute=full",),
    ],
    ids=["fp32", "bf16", "swiglu", "dense", "no-locals", "shared-head", "frozen", "full"],
)
def test_saved_bytes_of_a_small_step(overrides):
    config = load_config(None, [*TINY, *overrides])
    measured = StepCosts(config).activations(16)
    assert measured.saved == pytest.approx(bytes_saved_by_a_step(config, 16), rel=0.02)
    # The backward adds gradients and what a block computes anew: less than half of what all four blocks would keep.
    plain = bytes_saved_by_a_step(load_config(None, [*TINY, *overrides, "performance.recompute=none"]), 16)
    assert measured.saved <= measured.peak < measured.saved + 0.5 * plain


def test_recomputing_saves_less():
    none, selective, full = (
        StepCosts(load_config(None, [*TINY, f"performance.recompute={mode}"])).activations(16)
        for mode in ("none", "selective", "full")
    )
    assert none.saved > selective.saved > full.saved
    assert none.peak > selective.peak > full.peak


def test_saved_bytes_of_compiled_blocks():
    config = load_config(None, [*TINY, "student.ffn_layer=swiglufused", "student.drop_path_rate=0.4", *BF16])
    eager, compiled = (StepCosts(config, compiled).activations(16).saved for compiled in (False, True))
    assert compiled < 0.95 * eager
    assert compiled == pytest.approx(bytes_saved_by_a_step(config, 16, compiled=True), rel=0.02)


def test_saved_bytes_of_the_full_recipe(giant):
    """The published accounting has ~67 GB with norms and gates kept once, and logits of at most 4 GB."""
    saved = giant.activations(IMAGES)
    assert 80e9 < saved.saved < 40 * 27_297 * 80_000 + 5e9
    assert saved.peak - saved.saved < 5e9


def test_measuring_leaves_nothing_behind():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    costs = StepCosts(load_config(None, list(TINY)))
    assert costs.flops(4) == costs.flops(4)
    assert torch.equal(torch.rand(2), expected)
    assert get_global_size() == 1


def test_shapes_of_a_batch_are_those_of_collation():
    config = load_config(None, list(TINY))
    real = random_batch(config, 6)
    with FakeTensorMode():
        fake = fake_batch(config, 6)
    for name, value in fake.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == real[name].shape, name
            assert value.dtype == real[name].dtype, name
        else:
            assert len(value) == len(real[name]), name
