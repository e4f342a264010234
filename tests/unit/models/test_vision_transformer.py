"""Tokens, masks, positions, precision and weights of the backbone."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.models.vision_transformer import DinoVisionTransformer, resample_positions, vit_giant2
from tests.helpers.backbones import SMALL, chunked, random_backbone

BLOCK_KEYS = {
    *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
    *(f"attn.{linear}.{kind}" for linear in ("qkv", "proj") for kind in ("weight", "bias")),
    "ls1.gamma",
    "ls2.gamma",
}
OTHER_KEYS = {
    "cls_token",
    "mask_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "norm.weight",
    "norm.bias",
}
FFN_KEYS = {
    "mlp": {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"},
    "swiglufused": {"mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias"},
    "swiglu": {"mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias"},
    "identity": set(),
}


def images(batch: int, size: int = 56) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn_layer", FFN_KEYS)
def test_keys_are_metas(ffn_layer, registers):
    model = DinoVisionTransformer(**SMALL, ffn_layer=ffn_layer, num_register_tokens=registers)
    blocks = {f"blocks.{i}.{key}" for i in range(3) for key in BLOCK_KEYS | FFN_KEYS[ffn_layer]}
    assert set(model.state_dict()) == blocks | OTHER_KEYS | ({"register_tokens"} if registers else set())


@pytest.mark.parametrize("switch", ["qkv_bias", "proj_bias", "ffn_bias"])
def test_biases_can_be_left_out(switch):
    missing = {
        "qkv_bias": {"attn.qkv.bias"},
        "proj_bias": {"attn.proj.bias"},
        "ffn_bias": {"mlp.fc1.bias", "mlp.fc2.bias"},
    }
    full = set(DinoVisionTransformer(**SMALL).state_dict())
    without = set(DinoVisionTransformer(**SMALL, **{switch: False}).state_dict())
    assert full - without == {f"blocks.{i}.{key}" for i in range(3) for key in missing[switch]}


def test_giant_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = vit_giant2(patch_size=14, num_register_tokens=4, init_values=1e-5, ffn_layer="swiglufused")
    # transformers' count of the same model at a 16 x 16 grid, mask token and class position included.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 1134.777
    assert model.blocks[0].mlp.w12.weight.shape == (8192, 1536)
    assert model.pos_embed.shape == (1, 257, 1536)


@pytest.mark.parametrize("registers", [0, 4])
def test_outputs(registers):
    model = random_backbone(num_register_tokens=registers)
    x, masks = images(2), torch.rand(2, 16) < 0.5
    out = model(x, masks=masks, is_training=True)
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    assert shapes == {
        "x_norm_clstoken": (2, 96),
        "x_norm_regtokens": (2, registers, 96),
        "x_norm_patchtokens": (2, 16, 96),
        "x_prenorm": (2, 17 + registers, 96),
        "masks": (2, 16),
    }
    assert out["masks"] is masks
    tokens = F.layer_norm(out["x_prenorm"], (96,), model.norm.weight, model.norm.bias, eps=1e-6)
    torch.testing.assert_close(out["x_norm_clstoken"], tokens[:, 0])
    torch.testing.assert_close(out["x_norm_regtokens"], tokens[:, 1 : 1 + registers])
    torch.testing.assert_close(out["x_norm_patchtokens"], tokens[:, 1 + registers :])
    torch.testing.assert_close(model(x), model.forward_features(x)["x_norm_clstoken"])


def test_masks_replace_exactly_the_masked_patches():
    model, x, masks = random_backbone(num_register_tokens=4), images(3), torch.rand(3, 16) < 0.4
    plain, masked = model.prepare_tokens_with_masks(x), model.prepare_tokens_with_masks(x, masks)
    unchanged = torch.cat([torch.ones(3, 5, dtype=torch.bool), ~masks], dim=1)
    assert (plain == masked).all(dim=2).equal(unchanged)
    expected = (model.mask_token + model.pos_embed[:, 1:]).expand(3, -1, -1)
    torch.testing.assert_close(masked[:, 5:][masks], expected[masks])


def test_several_crop_sizes_equal_separate_calls():
    model = random_backbone(num_register_tokens=4)
    crops, masks = [images(2), images(5, 28)], [torch.rand(2, 16) < 0.5, None]
    together = model.forward_features(crops, masks)
    assert len(together) == 2
    for out, crop, mask in zip(together, crops, masks, strict=True):
        torch.testing.assert_close(out, model.forward_features(crop, mask))
    unmasked = model(crops, is_training=True)
    torch.testing.assert_close(unmasked[1], together[1])
    assert unmasked[0]["masks"] is None


@pytest.mark.parametrize(("uniform", "rates"), [(True, [0.4, 0.4, 0.4, 0.4]), (False, [0, 0.4 / 3, 0.8 / 3, 0.4])])
def test_rates_of_stochastic_depth(uniform, rates):
    model = DinoVisionTransformer(**{**SMALL, "depth": 4}, drop_path_rate=0.4, drop_path_uniform=uniform)
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx(rates)


def test_stochastic_depth_acts_in_training_only():
    x = images(8)
    model = random_backbone(drop_path_rate=0.4, drop_path_uniform=True)
    expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, expected) and not torch.equal(first, second)
    for block in model.blocks:
        block.drop_path_rate = 0.0
    torch.testing.assert_close(model(x), expected)


def test_every_branch_draws_its_own_images():
    model, seen = random_backbone(drop_path_rate=0.4, drop_path_uniform=True).train(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.extend(order for orders in args[2] for order in orders))
    model([images(40, 14), images(40, 28)], is_training=True)
    assert len({tuple(order[0].tolist()) for order in seen}) == 3 * 2 * 2  # blocks, branches, crop sizes


def independent_grid(model, rows, columns):
    """Positions for a grid by PyTorch's interpolation, with exact sides or with the scale (side + offset) / 4."""
    grid = model.pos_embed[0, 1:].reshape(4, 4, 96).permute(2, 0, 1)[None].float()
    offset = model.interpolate_offset
    sides = {"scale_factor": ((rows + offset) / 4, (columns + offset) / 4)} if offset else {"size": (rows, columns)}
    grid = F.interpolate(grid, mode="bicubic", antialias=model.interpolate_antialias, **sides)
    return grid[0].permute(1, 2, 0).reshape(rows * columns, 96).double()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (7, 7), (3, 6), (5, 4), (4, 5)])
def test_position_grid_is_resampled(rows, columns, offset, antialias):
    model = random_backbone(interpolate_offset=offset, interpolate_antialias=antialias)
    tokens = torch.zeros(1, 1 + rows * columns, 96, dtype=torch.float64)
    positions = model.interpolate_pos_encoding(tokens, 14 * rows, 14 * columns)
    torch.testing.assert_close(positions[0, 1:], independent_grid(model, rows, columns))
    torch.testing.assert_close(positions[:, :1], model.pos_embed[:, :1])


def test_own_position_grid_is_left_alone():
    model = random_backbone(interpolate_offset=0.1)
    positions = model.interpolate_pos_encoding(torch.zeros(1, 17, 96, dtype=torch.float64), 56, 56)
    assert torch.equal(positions, model.pos_embed)
    # Four rows of four are as many patches as two rows of eight, which need other positions.
    other = resample_positions(model.pos_embed, (2, 8))
    assert other.shape == model.pos_embed.shape and not torch.equal(other, model.pos_embed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ffn_layer": "moe"}, "ffn_layer is 'moe'; one of mlp, swiglu, swiglufused, identity is expected"),
        ({"interpolate_offset": 1.0}, "interpolate_offset is 1.0; a number from 0 to below 1 is expected"),
        ({"num_heads": 5}, "num_heads = 5 does not divide the width 96"),
        ({"attention_backend": "fast"}, "attention_backend = 'fast' is unknown"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DinoVisionTransformer(**{**SMALL, **arguments})


def test_impossible_inputs():
    model = random_backbone()
    with pytest.raises(ValueError, match="57 x 57 px do not divide into patches of 14 px"):
        model(images(1, 57))
    with pytest.raises(ValueError, match=r"masks are \(1, 4\); \(1, 16\) is expected"):
        model.forward_features(images(1), torch.zeros(1, 4, dtype=torch.bool))
    for n in ([3], 4, [-1]):
        with pytest.raises(ValueError, match="the blocks are numbered 0 to 2"):
            model.get_intermediate_layers(images(1), n)


@pytest.mark.parametrize("how", ["autocast", "16-bit parameters"])
def test_residual_stream_stays_in_float32(how):
    model, x = random_backbone(num_register_tokens=4).float(), images(2).float()
    streams, products = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: streams.extend([args[0].dtype, out.dtype]))
        block.mlp.fc1.register_forward_hook(lambda _, args, out: products.append(out.dtype))
    expected = model(x)
    streams.clear(), products.clear()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = model.forward_features(x)
    else:
        out = model.bfloat16().forward_features(x)
    assert set(streams) == {torch.float32} and set(products) == {torch.bfloat16}
    assert out["x_prenorm"].dtype == torch.float32
    assert F.cosine_similarity(out["x_norm_clstoken"].float(), expected).min() > 0.999


def test_chunked_weights_load():
    model = random_backbone(num_register_tokens=4)
    other = random_backbone(num_register_tokens=4)
    weights = chunked(model.state_dict())
    assert "blocks.1.2.norm1.weight" in weights
    other.load_state_dict(weights)
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_initial_weights_reach_every_parameter():
    with torch.device("meta"):
        model = DinoVisionTransformer(**{**SMALL, "init_values": 0.3}, num_register_tokens=4)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    state = model.state_dict()
    assert [key for key, value in state.items() if not value.isfinite().all()] == []
    for key, value in state.items():
        if (key.endswith(".bias") and "patch_embed" not in key) or key == "mask_token":
            assert (value == 0).all(), key
        elif "norm" in key:
            assert (value == 1).all(), key
        elif "gamma" in key:
            assert (value == 0.3).all(), key
        elif key in ("cls_token", "register_tokens"):
            assert value.std().item() == pytest.approx(1e-6, rel=0.3), key
        elif "patch_embed" not in key:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), key
