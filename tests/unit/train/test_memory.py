"""Predicted memory against what autograd holds, counted on fake tensors at full and on real ones at tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dinov2.train.plan.activations import blocks_saved
from dinov2.train.plan.flops import StepShape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import dinov2
from dinov2.configs import Config, load_config
from dinov2.layers.stochastic_depth import draw_orders
from dinov2.train.plan.memory import check_fits, largest_batch, meta_student, predict_memory, resolve_batch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.runs import TINY

RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"
GIB = 2**30
# 16-bit weights of the giant's blocks, which autograd saves where no copies are kept (a bare network keeps none).
CASTS = 2 * 40 * (4 * 1536**2 + 3 * 1536 * 4096)
PLAIN = (
    "debug.inverse_gather=false",
    "debug.factored_targets=false",
    "debug.prune_last_block=false",
)
BF16 = tuple(
    f"compute_precision.student.{module}.mixed_precision.param_dtype=bf16"
    for module in ("backbone", "dino_head", "ibot_head")
)


class Saved:
    """Bytes of the distinct storages that autograd saves, parameters apart."""

    def __init__(self, module: torch.nn.Module):
        self.storages = {}
        self._known = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self.storages[storage._cdata] = storage  # kept alive, so that no address is used twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def fake_batch(config: Config, images: int) -> dict[str, torch.Tensor]:
    crops, shape = config.crops, StepShape.of(config, images)
    return {
        "global_crops": torch.empty(2 * images, 3, crops.global_crops_size, crops.global_crops_size),
        "local_crops": torch.empty(
            crops.local_crops_number * images, 3, crops.local_crops_size, crops.local_crops_size
        ),
        "masks": torch.zeros(2 * images, shape.patches[0], dtype=torch.bool),
        "mask_indices": torch.zeros(shape.masked, dtype=torch.int64),
        "mask_weight": torch.zeros(shape.masked),
    }


def bytes_saved_by_a_step(config: Config, images: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it looks at the values
    with FakeTensorMode(allow_non_fake_inputs=True):
        arch = SSLMetaArch(config).train()
        arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)
        batch, saved = fake_batch(config, images), Saved(arch)
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            arch.compute_losses(batch, 0.07)
    # In float32 the embedding saves the crops themselves, which are no activation.
    crops = {batch[name].untyped_storage()._cdata for name in ("global_crops", "local_crops")}
    return sum(storage.nbytes() for key, storage in saved.storages.items() if key not in crops)


def test_saved_bytes_of_the_full_recipe(monkeypatch):
    config = load_config(RECIPE)
    measured = bytes_saved_by_a_step(config, 48, monkeypatch)
    predicted = predict_memory(config, meta_student(config), 48, compiled=False)
    assert predicted.blocks + predicted.ends + CASTS == pytest.approx(measured, rel=0.03)


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
    ],
    ids=["fp32", "bf16", "swiglu", "dense", "no-locals", "shared-head", "frozen"],
)
def test_saved_bytes_of_a_small_step(overrides, monkeypatch):
    config = load_config(None, [*TINY, *PLAIN, *overrides])
    images = 64
    student = meta_student(config)
    predicted = predict_memory(config, student, images, compiled=False)
    measured = bytes_saved_by_a_step(config, images, monkeypatch)
    in_16_bit = config.compute_precision.student.backbone.mixed_precision.param_dtype == "bf16"
    casts = 2 * sum(p.numel() for p in student.backbone.blocks.parameters() if p.ndim == 2) * in_16_bit
    assert predicted.blocks + predicted.ends + casts == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [(), ("debug.inverse_gather=false",), ("student.ffn_layer=mlp", "student.drop_path_rate=0")],
    ids=["inverse", "index_add", "dense-mlp"],
)
def test_saved_bytes_of_compiled_blocks(overrides):
    """Inductor's partitioner chooses; a backend without code generation shares it."""
    changes = ("student.ffn_layer=swiglufused", "student.drop_path_rate=0.4", *BF16, *overrides)
    config = load_config(None, [*TINY, "debug.prune_last_block=false", *changes])
    shape, student = StepShape.of(config, 32), SSLMetaArch(config).student
    block, width = student.backbone.blocks[0], student.backbone.embed_dim
    x = torch.randn(sum(b * n for b, n in shape.segments), width, requires_grad=True)
    orders = draw_orders(shape.segments, 2, x.device) if block.drop_path_rate else None
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    saved = Saved(block)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        compiled(x, shape.segments, orders)
    casts = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)
    predicted, _ = blocks_saved(config, student.backbone, shape, compiled=True)
    assert predicted / 4 == pytest.approx(saved.bytes - casts, rel=0.05)


@pytest.mark.parametrize(("compiled", "most"), [(True, 64_000), (False, 80_000)], ids=["compiled", "eager"])
def test_bytes_of_a_giant_block_stay_under_a_ceiling(compiled, most):
    """Per kept row: 27,297 of them at the recipe's 48 images."""
    config = load_config(RECIPE)
    predicted = predict_memory(config, meta_student(config), 48, compiled=compiled)
    assert predicted.blocks / 40 / 27_297 < most


def test_states_by_hand():
    """fp32 student, teacher, gradient and two moments take 20 bytes a parameter, 16-bit copies 2 per matrix and net."""
    config = load_config(RECIPE)
    student = meta_student(config)
    parameters = sum(p.numel() for p in student.parameters())
    alone = predict_memory(config, student, 48)
    assert alone.weights + alone.moments + alone.gradients == 20 * parameters
    assert alone.copies == 2 * CASTS
    eight = predict_memory(config, student, 48, world_size=8)
    assert eight.weights + eight.moments + eight.gradients == pytest.approx(20 * parameters / 8, abs=100)
    assert (
        2 * parameters < eight.copies < 2.2 * parameters
    )  # the student's whole, three blocks of the teacher's


@pytest.mark.parametrize(
    ("strategy", "world", "shards"),
    [("NO_SHARD", 16, 1), ("HYBRID_SHARD", 16, 8), ("FULL_SHARD", 16, 16), ("HYBRID_SHARD", 4, 4)],
)
def test_shards_by_strategy(strategy, world, shards):
    keys = [
        f"compute_precision.{network}.{module}.sharding_strategy={strategy}"
        for network in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
    ]
    config = load_config(RECIPE, keys)
    student = meta_student(config)
    predicted = predict_memory(config, student, 48, world, gpus_per_node=8)
    parameters = sum(p.numel() for p in student.parameters())
    assert predicted.weights == pytest.approx(8 * parameters / shards, abs=100)
    if strategy == "FULL_SHARD":
        assert predicted.copies < parameters  # a few blocks and the heads, not two bytes of everything


def test_recompute_lowers_the_prediction():
    totals = {}
    for mode in ("none", "selective", "full"):
        config = load_config(RECIPE, [f"performance.recompute={mode}"])
        totals[mode] = predict_memory(config, meta_student(config), 48)
    assert totals["none"].total > totals["selective"].total > totals["full"].total
    assert totals["full"].blocks == 40 * 45_792 * 1536 * 4  # the input of every block


def test_the_published_accounting():
    """States ~31 GB, activations ~67 GB (51 GB with norms and SwiGLU recomputed), logits at most 4 GB, in GB.

    That accounting has heads of 384 in 16 bit among its states, one copy less of the attended values, and 3,402
    masked rows where the bound is 4,440.
    """
    config = load_config(RECIPE)
    predicted = predict_memory(config, meta_student(config), 48)
    assert (predicted.states + predicted.gradients) / 1e9 == pytest.approx(31, rel=0.07)
    assert (predicted.blocks + predicted.ends) / 1e9 == pytest.approx(67, rel=0.07)
    selective = load_config(RECIPE, ["performance.recompute=selective"])
    assert predict_memory(selective, meta_student(selective), 48).blocks / 1e9 == pytest.approx(51, rel=0.07)
    assert predicted.loss_peak + predicted.ends < 5e9


def test_largest_batch_is_the_last_that_fits():
    assert largest_batch(lambda n: 10 + 3 * n, 10 + 3 * 74) == 74
    assert largest_batch(lambda n: 10 + 3 * n, 10 + 3 * 74 - 1) == 72
    assert largest_batch(lambda n: 10 + 3 * n, 16) == 2
    assert largest_batch(lambda n: 10 + 3 * n, 15) == 0


def test_auto_fills_the_memory_but_for_the_margin():
    config = load_config(RECIPE, ["train.batch_size_per_gpu=auto"])
    batch = resolve_batch(config, 1, 139 * GIB)
    student = meta_student(config)
    assert batch % 2 == 0
    assert predict_memory(config, student, batch).total <= 0.92 * 139 * GIB
    assert predict_memory(config, student, batch + 2).total > 0.92 * 139 * GIB
    assert resolve_batch(load_config(RECIPE), 1, None) == 48


def test_auto_that_cannot_be():
    config = load_config(RECIPE, ["train.batch_size_per_gpu=auto"])
    with pytest.raises(ValueError, match="auto needs a GPU"):
        resolve_batch(config, 1, None)
    with pytest.raises(ValueError, match=r"2 images are predicted to take .* of the 16\.0 GiB .*recompute"):
        resolve_batch(config, 1, 16 * GIB)


def test_a_fixed_batch_that_does_not_fit():
    config = load_config(RECIPE)
    need = predict_memory(config, meta_student(config), 48).total
    assert check_fits(config, 48, 1, need) is None
    assert "may not fit" in check_fits(config, 48, 1, int(need / 1.1))
    with pytest.raises(ValueError, match=r"batch_size_per_gpu = 48 .* 3\d images would fit.*recompute"):
        check_fits(config, 48, 1, int(need / 1.2))
