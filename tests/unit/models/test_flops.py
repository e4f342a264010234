"""The giant model's arithmetic at the recipe's sizes: stochastic depth saves what it should, packing costs nothing."""

from pathlib import Path

import pytest
import torch
from dinov2.train.plan.flops import step_flops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dinov2
from dinov2.configs import load_config
from dinov2.models.vision_transformer import vit_giant2
from dinov2.train.plan.memory import meta_student
from dinov2.train.ssl_meta_arch import SSLMetaArch

RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"

DEPTH, WIDTH, HIDDEN = 40, 1536, 4096
GLOBAL_TOKENS, LOCAL_TOKENS = 256 + 5, 49 + 5


def forward_flops(num_global: int, num_local: int) -> float:
    """Multiply-adds count two: linear maps on every token of the kept images, attention within each image."""
    weights = 3 * WIDTH**2 + WIDTH**2 + 2 * WIDTH * HIDDEN + HIDDEN * WIDTH
    tokens = num_global * GLOBAL_TOKENS + num_local * LOCAL_TOKENS
    attention = 4 * WIDTH * (num_global * GLOBAL_TOKENS**2 + num_local * LOCAL_TOKENS**2)
    return DEPTH * (2 * weights * tokens + attention)


@pytest.mark.parametrize(
    ("drop_path", "kept", "teraflops"), [(0.4, (57, 230), 62.9), (0.0, (96, 384), 105.6)]
)
def test_student_forward(drop_path, kept, teraflops):
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
    assert counter.get_total_flops() - patches == forward_flops(*kept)
    assert forward_flops(*kept) / 1e12 == pytest.approx(teraflops, abs=0.05)


def attention(num_global: int, num_local: int) -> int:
    return 4 * WIDTH * (num_global * GLOBAL_TOKENS**2 + num_local * LOCAL_TOKENS**2)


def heads(rows_cls: int, rows_patches: int) -> int:
    """One forward pass of both heads: three layers of 2048 and a bottleneck of 384 or 256 onto 131,072 prototypes."""
    weights = [WIDTH * 2048 + 2048**2 + 2048 * z + z * 131_072 for z in (384, 256)]
    assert [2 * w for w in weights] == [116_916_224, 82_837_504]
    return 2 * (weights[0] * rows_cls + weights[1] * rows_patches)


def executed_step(pruned: bool) -> int:
    """A step of 48 images, attention's backward as 2.5 forwards, written out."""
    kept, seen = 57 * GLOBAL_TOKENS + 230 * LOCAL_TOKENS, 96 * GLOBAL_TOKENS
    assert (kept, seen) == (27_297, 25_056)
    qkv, rest = 3 * WIDTH**2, WIDTH**2 + 3 * WIDTH * HIDDEN
    whole_blocks = DEPTH - 1 if pruned else DEPTH
    linear = 2 * whole_blocks * (qkv + rest) * (3 * kept + seen)
    masked = 24 * (int(256 * 0.275) + int(256 * 0.45))
    if pruned:
        linear += 2 * (qkv * (3 * kept + seen) + rest * (3 * (480 + masked) + 96 + masked))
    mixing = DEPTH * (7 * attention(57, 230) // 2 + attention(96, 0))
    patches = 2 * 588 * WIDTH * (2 * (96 * 256 + 384 * 49) + 96 * 256)
    return linear + mixing + 3 * heads(480, masked) + heads(96, masked) + patches


def sdpa(query, key, *args, out_shape=None, **kwargs) -> int:
    """Scores and their product with the values; shapes are (B, H, N, d)."""
    batch, num_heads, tokens, size = query
    return 4 * batch * num_heads * tokens * key[2] * size


def sdpa_backward(grad, query, key, *args, out_shape=None, **kwargs) -> int:
    """Scores again, and two products for each of them."""
    return sdpa(query, key) * 5 // 2


# PyTorch 2.11 does not count attention on a CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward,
}


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_training_step(pruned, monkeypatch):
    """Forward, losses and backward of the full recipe, counted operation by operation."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it looks at the values
    config = load_config(RECIPE, [f"debug.prune_last_block={str(pruned).lower()}"])
    images, masked = 48, 24 * 185
    counting = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with FakeTensorMode(allow_non_fake_inputs=True), counting as counter:
        arch = SSLMetaArch(config).train()
        batch = {
            "global_crops": torch.empty(2 * images, 3, 224, 224),
            "local_crops": torch.empty(8 * images, 3, 98, 98),
            "masks": torch.zeros(2 * images, 256, dtype=torch.bool),
            "mask_indices": torch.zeros(masked, dtype=torch.int64),
            "mask_weight": torch.zeros(masked),
        }
        arch.compute_losses(batch, teacher_temp=0.07)["total_loss"].backward()
    similarities = 2 * 3 * 2 * images**2 * WIDTH  # of the KDE regulariser, per global view
    assert counter.get_total_flops() - similarities == executed_step(pruned)
    assert step_flops(config, meta_student(config), images).hardware == executed_step(pruned)
