"""Keys, tokens, norms, positions and computation of DINOv3's backbone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from dinov2.layers import RopePositionEmbedding
from dinov2.layers.linear import KeyMaskedLinear, keep_low_precision_weights, use_fp8
from dinov2.layers.recompute import compiled_and_recomputed
from dinov2.models.dinov3 import Dinov3VisionTransformer, dinov3_vit7b16, dinov3_vits16
from dinov2.train.update.optim import parameter_groups
from tests.helpers.backbones import random_dinov3

BLOCK_KEYS = {
    *(f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(f"attn.{linear}.{kind}" for linear in ("qkv", "proj") for kind in ("weight", "bias")),
    "ls1.gamma", "ls2.gamma",
}  # fmt: skip
OTHER_KEYS = {
    "cls_token", "storage_tokens", "mask_token", "rope_embed.periods", "patch_embed.proj.weight",
    "patch_embed.proj.bias", "norm.weight", "norm.bias",
}  # fmt: skip
FFN_KEYS = {"mlp": ("fc1", "fc2"), "swiglu64": ("w1", "w2", "w3")}
UNTIED = {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}


def images(batch: int, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("ffn_layer", FFN_KEYS)
def test_keys_are_metas(ffn_layer):
    model = random_dinov3(ffn_layer=ffn_layer, **UNTIED)
    ffn = {f"mlp.{name}.{kind}" for name in FFN_KEYS[ffn_layer] for kind in ("weight", "bias")}
    blocks = {f"blocks.{i}.{key}" for i in range(3) for key in BLOCK_KEYS | ffn | {"attn.qkv.bias_mask"}}
    norms = {f"{name}.{kind}" for name in ("cls_norm", "local_cls_norm") for kind in ("weight", "bias")}
    assert set(model.state_dict()) == blocks | OTHER_KEYS | norms
    plain = random_dinov3(ffn_layer=ffn_layer, mask_k_bias=False, n_storage_tokens=0)
    left_out = norms | {"storage_tokens"} | {key for key in blocks if key.endswith("bias_mask")}
    assert set(plain.state_dict()) == (blocks | OTHER_KEYS) - left_out


def test_published_sizes():
    with torch.device("meta"):
        small, largest = dinov3_vits16(), dinov3_vit7b16()
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 3) == 21.601
    assert round(sum(p.numel() for p in largest.parameters()) / 1e6) == 6716
    assert largest.blocks[0].mlp.w1.weight.shape == (8192, 4096)
    assert not any("qkv.bias" in key for key in largest.state_dict())


def test_periods_and_angles():
    rope = RopePositionEmbedding(16, base=100.0)
    assert rope.periods.tolist() == pytest.approx([1, 100**0.25, 10, 100**0.75], rel=1e-6)
    assert RopePositionEmbedding(16, None, 0.5, 4).periods.tolist() == pytest.approx([0.5, 1, 2, 4], rel=1e-6)
    cos, sin = rope((2, 3))[0].double()
    for row in range(2):
        for column in range(3):
            y, x = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
            angles = [2 * math.pi * c / 100 ** (j / 4) for c in (y, x) for j in range(4)]
            number = 3 * row + column
            torch.testing.assert_close(cos[number], torch.tensor(angles).double().cos(), atol=1e-6, rtol=0)
            torch.testing.assert_close(sin[number], torch.tensor(angles).double().sin(), atol=1e-6, rtol=0)


def test_root_mean_square_norms():
    """Gains alone, under Meta's names, and without a mean (arXiv:1910.07467, equation 4)."""
    model = random_dinov3(norm_layer="rmsnorm", **UNTIED)
    of_layer_norms = random_dinov3(**UNTIED).state_dict().keys()
    biases = {key for key in of_layer_norms if "norm" in key and key.endswith("bias")}
    assert model.state_dict().keys() == of_layer_norms - biases and len(biases) == 3 * 2 + 3
    tokens = model(images(2), is_training=True)
    x = tokens["x_prenorm"][:, 5:]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    torch.testing.assert_close(tokens["x_norm_patchtokens"], expected)


@pytest.mark.parametrize(("normalize", "over"), [("min", 2), ("max", 4)])
def test_coordinates_over_one_side(normalize, over):
    rope = RopePositionEmbedding(4, normalize_coords=normalize)  # one period of 1
    angles = torch.atan2(*rope((2, 4))[0].flip(0)).double()
    rows = torch.tensor([2 * (i + 0.5) / over - 1 for i in range(2)], dtype=torch.float64)
    expected = (2 * math.pi * rows).repeat_interleave(4)
    torch.testing.assert_close(torch.exp(1j * angles[:, 0]), torch.exp(1j * expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"shift_coords": 0.3}, {"jitter_coords": 1.5}, {"rescale_coords": 2.0}], ids=lambda o: next(iter(o))
)
def test_augmented_coordinates_stay_in_their_bounds(options):
    rope, name, most = RopePositionEmbedding(4, base=1.0, **options), *next(iter(options.items()))
    rope.periods.fill_(100)  # angles stay below pi
    plain = torch.atan2(*rope((4, 4))[0].flip(0)).double() * 100 / (2 * math.pi)
    found = torch.atan2(*rope((4, 4), rope.drawn(500)).unbind(1)[::-1]).double() * 100 / (2 * math.pi)
    change = found - plain if name == "shift_coords" else (found / plain).log()
    assert change.abs().max() <= (most if name == "shift_coords" else math.log(most)) + 1e-3
    assert change.abs().max() > 0.9 * (most if name == "shift_coords" else math.log(most))
    same_for_both = torch.allclose(change[..., 0], change[..., 1], atol=1e-3)
    assert same_for_both == (name == "rescale_coords")
    assert torch.allclose(change, change[:, :1], atol=1e-3)  # of all patches


def test_augmentation_follows_from_the_seed_and_acts_in_training_only():
    model, x = random_dinov3(pos_embed_rope_rescale_coords=2.0), images(2)
    expected = model(x)
    assert torch.equal(model(x), expected)
    model.train()
    state = torch.random.get_rng_state()
    first, second = model(x), model(x)
    torch.random.set_rng_state(state)
    assert not torch.equal(first, expected) and not torch.equal(first, second)
    assert torch.equal(model(x), first)


def test_every_block_has_positions_of_its_own_and_draws_none():
    model, seen = random_dinov3(pos_embed_rope_jitter_coords=2.0).train(), []

    def record(_, args, kwargs, out):
        state = torch.random.get_rng_state()
        seen.extend(rotation.sum().item() for rotation in args[4])
        assert torch.equal(torch.random.get_rng_state(), state)

    states = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: states.append(torch.random.get_rng_state()))
        block.register_forward_hook(lambda *_: states.append(torch.random.get_rng_state()))
        block.register_forward_hook(record, with_kwargs=True)
    model([images(2), images(3, 32)], is_training=True)
    assert len(set(seen)) == 3 * 2
    assert all(torch.equal(state, states[0]) for state in states)


def test_several_crop_sizes_equal_separate_calls():
    model = random_dinov3(ffn_layer="swiglu", **UNTIED)
    crops, masks = [images(2), images(5, 32)], [torch.rand(2, 16) < 0.5, None]
    for out, crop, mask in zip(model.forward_features(crops, masks), crops, masks, strict=True):
        torch.testing.assert_close(out, model.forward_features(crop, mask))


def test_norms_of_class_and_local_tokens():
    model = random_dinov3(**UNTIED)
    crops, masks = [images(2), images(3, 32)], [torch.rand(2, 16) < 0.5, None]

    def normed(tokens, norm):
        return F.layer_norm(tokens, (96,), norm.weight, norm.bias, eps=1e-5)

    for training in (False, True):
        model.train(training)
        outputs = model(crops, masks=masks, is_training=True)
        for out, of_class in zip(outputs, (model.cls_norm, model.local_cls_norm), strict=True):
            prenorm, of_class = out["x_prenorm"], of_class if training else model.cls_norm
            torch.testing.assert_close(out["x_norm_clstoken"], normed(prenorm[:, 0], of_class))
            torch.testing.assert_close(out["x_norm_regtokens"], normed(prenorm[:, 1:5], of_class))
            torch.testing.assert_close(out["x_norm_patchtokens"], normed(prenorm[:, 5:], model.norm))


@pytest.mark.parametrize("untied", [{}, UNTIED], ids=["tied", "untied"])
def test_last_block_of_selected_tokens(untied):
    model = random_dinov3(drop_path_rate=0.3, pos_embed_rope_rescale_coords=2.0, **untied).train()
    crops, masks = [images(4), images(6, 32)], [torch.rand(4, 16) < 0.5, None]
    index = masks[0].flatten().nonzero().flatten()
    results = []
    for selected in ({}, {"patch_index": index}):
        torch.manual_seed(3)
        outputs = model(crops, masks=masks, is_training=True, **selected)
        patches = outputs[0].get("x_norm_indexedtokens")
        patches = outputs[0]["x_norm_patchtokens"].flatten(0, 1)[index] if patches is None else patches
        tokens = torch.cat([*(out["x_norm_clstoken"] for out in outputs), patches])
        gradients = torch.autograd.grad((tokens * torch.arange(96)).square().sum(), list(model.parameters()))
        results.append([tokens, *gradients])
    torch.testing.assert_close(*results)


def test_masked_bias_of_keys():
    layer = KeyMaskedLinear(4, 12).double()
    assert layer.bias_mask.isnan().all() and layer(torch.ones(1, 4).double()).isnan().all()
    layer.reset_mask()
    layer.bias.data.fill_(7)
    expected = torch.tensor([7] * 4 + [0] * 4 + [7] * 4).double()
    torch.testing.assert_close(layer(torch.zeros(1, 4).double())[0], expected)
    low = layer.float()
    keep_low_precision_weights(low, torch.bfloat16)
    torch.testing.assert_close(low(torch.zeros(1, 4))[0].double(), expected)


def test_masks_that_were_never_set_are_refused():
    model = random_dinov3()
    model.check_kernels(torch.float32, torch.device("cpu"))
    model.blocks[1].attn.qkv.bias_mask.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv.bias_mask") as error:
        model.check_kernels(torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_initial_weights_reach_every_tensor():
    with torch.device("meta"):
        model = Dinov3VisionTransformer(
            embed_dim=96, depth=2, num_heads=4, n_storage_tokens=4, mask_k_bias=True, layerscale_init=0.3, **UNTIED
        )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    model.init_weights()
    assert [key for key, value in model.state_dict().items() if not value.isfinite().all()] == []


def test_layers_for_the_decay_of_learning_rates():
    model = random_dinov3(**UNTIED)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert {layers[f"{norm}.weight"] for norm in ("norm", "cls_norm", "local_cls_norm")} == {4}
    assert {layers[name] for name in ("cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight")} == {0}
    groups = parameter_groups({"backbone": model}, 0.5, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(layers)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients(mode):
    results = []
    for recompute in ("none", mode):
        torch.manual_seed(1)
        model = random_dinov3(drop_path_rate=0.3, pos_embed_rope_rescale_coords=2.0, ffn_layer="swiglu").train()
        for block in model.blocks:
            block.forward = compiled_and_recomputed(block.forward, recompute, None)
        outputs = model([images(4), images(6, 32)], masks=[torch.rand(4, 16) < 0.5, None], is_training=True)
        loss = sum(out["x_norm_clstoken"].square().sum() + out["x_norm_patchtokens"].sum() for out in outputs)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_equal_blocks_share_one_compiled_graph():
    model, counter = (
        random_dinov3(drop_path_rate=0.3, pos_embed_rope_rescale_coords=2.0).float().train(),
        CompileCounter(),
    )
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        model([images(4).float(), images(6, 32).float()], is_training=True)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_fp8_stays_near():
    model = random_dinov3(ffn_layer="swiglu").float()
    x = images(2).float()
    expected = model(x)
    use_fp8(model.blocks, "tensor", backward=True)
    found = model(x)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize(
    "arguments",
    [
        {"ffn_layer": "swiglufused"}, {"norm_layer": "batchnorm"}, {"num_heads": 5}, {"num_heads": 48},
        {"pos_embed_rope_normalize_coords": "mean"}, {"pos_embed_rope_min_period": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(arguments):
    with pytest.raises(ValueError, match=r".") as error:
        random_dinov3(**arguments)
    assert "\n" not in str(error.value)
    assert str(next(iter(arguments.values()))) in str(error.value)
