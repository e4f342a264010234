"""The giant model's arithmetic at the recipe's sizes: stochastic depth saves what it should, packing costs nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2.models.vision_transformer import vit_giant2

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
