"""Files that timm and transformers write open here, and compute what they compute; all in float32."""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf
from torch import Tensor, nn

from dinov2.export import main as export
from dinov2.extensions import BACKBONES
from dinov2.hub import load_teacher
from dinov2.hub.pretrained import check_shapes, load_pretrained, starting_state
from tests.helpers.backbones import random_backbone, random_dinov3, randomise

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL = {"embed_dim": 128, "depth": 2, "num_heads": 4, "img_size": 56}
TIMM = {
    "DINOv2": ("vit_small_patch14_dinov2", {}),
    "with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "SwiGLU": ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 4.0}),
    "no LayerScale, a head": ("vit_tiny_patch16_224", {"img_size": 64, "num_classes": 5}),
    "Virchow's sizes": ("vit_huge_patch14_224", {"embed_dim": 1280, "depth": 1, "num_heads": 16, "mlp_ratio": 5.3375,
                                                 "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5,
                                                 "num_classes": 0}),
    "Virchow2's layout": ("vit_huge_patch14_224", {"mlp_ratio": 5.375, "reg_tokens": 4, "init_values": 1e-5,
                                                   "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "num_classes": 0}),
    "UNI-2's layout": ("vit_giant_patch14_224", {"mlp_ratio": 5.25, "reg_tokens": 8, "init_values": 1e-5,
                                                 "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "num_classes": 0,
                                                 "no_embed_class": True}),
    "kaiko's S/8": ("vit_small_patch8_224", {"img_size": 32, "num_classes": 0}),
    "UNI's layout": ("vit_large_patch16_224", {"img_size": 64, "init_values": 1e-5, "num_classes": 0}),
}  # fmt: skip


def timm_model(kind: str) -> nn.Module:
    name, options = TIMM[kind]
    options = {**SMALL, "dynamic_img_size": True, **options}
    return randomise(timm.create_model(name, **options)).eval()


def our_tokens(model: nn.Module, images: Tensor) -> Tensor:
    out = model.forward_features(images)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]], dim=1)


@pytest.mark.parametrize("kind", TIMM)
@torch.no_grad()
def test_folders_of_timm(kind: str, tmp_path: Path):
    theirs = timm_model(kind)
    as_text = {"model_args": {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}} if "mlp_layer" in TIMM[kind][1] else {}
    save_for_hf(theirs, tmp_path, safe_serialization=True, **as_text)
    ours = load_teacher(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    patch = ours.patch_size
    for side in (4 * patch, 3 * patch):
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(our_tokens(ours, images), theirs.forward_features(images), **CLOSE)


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_classifiers_of_transformers(registers: int, tmp_path: Path):
    options = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 56}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=registers, num_labels=3)
        theirs = transformers.Dinov2WithRegistersForImageClassification(config)
    else:
        theirs = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**options, num_labels=3))
    randomise(theirs).eval().save_pretrained(tmp_path)
    body = theirs.dinov2_with_registers if registers else theirs.dinov2
    images = torch.randn(2, 3, 56, 56)
    expected = body(images).last_hidden_state
    torch.testing.assert_close(our_tokens(load_teacher(tmp_path), images), expected, **CLOSE)
    theirs.save_pretrained(tmp_path / "split", max_shard_size="200KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    torch.testing.assert_close(our_tokens(load_teacher(tmp_path / "split"), images), expected, **CLOSE)


@torch.no_grad()
def test_plain_vits_of_transformers(tmp_path: Path):
    """Another eps of the layer norms, no LayerScale, no mask token, a pooler and a head."""
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        image_size=64, patch_size=16, layer_norm_eps=1e-2,
    )  # fmt: skip
    theirs = randomise(transformers.ViTModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(our_tokens(ours, images), theirs(images).last_hidden_state, **CLOSE)
    assert export(["--checkpoint", str(tmp_path), "--format", "timm", "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("mask_token", [True, False])
@torch.no_grad()
def test_a_transformers_file_without_its_mask_token(mask_token: bool, tmp_path: Path):
    options = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 56}
    theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**options))).eval()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if not mask_token:
        del state["embeddings.mask_token"]
    save_file(state, tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 56, 56)
    expected = theirs(images).last_hidden_state
    torch.testing.assert_close(our_tokens(load_teacher(tmp_path), images), expected, **CLOSE)


@torch.no_grad()
def test_a_student_with_layer_scale_starts_as_a_vit_without(tmp_path: Path):
    theirs = timm_model("no LayerScale, a head")
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = random_backbone(embed_dim=128, depth=2, patch_size=16, img_size=64)
    ours = ours.float()
    load_pretrained(ours, str(tmp_path))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(our_tokens(ours, images), theirs.forward_features(images), **CLOSE)
    assert all(torch.equal(block.ls1.gamma, torch.ones(128)) for block in ours.blocks)


SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
FULL_SIZE = {
    "kaiko S/16": ("vit_small_patch16_224", {}, "vit_small", {"patch_size": 16}),
    "kaiko S/8": ("vit_small_patch8_224", {}, "vit_small", {"patch_size": 8}),
    "kaiko B/16, DINO, iBOT, Phikon": ("vit_base_patch16_224", {}, "vit_base", {"patch_size": 16}),
    "kaiko B/8": ("vit_base_patch8_224", {}, "vit_base", {"patch_size": 8}),
    "kaiko L/14": ("vit_large_patch14_reg4_dinov2", {"img_size": 224}, "vit_large",
                   {"patch_size": 14, "num_register_tokens": 4, "init_values": 1.0}),
    "Virchow2": ("vit_huge_patch14_224", {"mlp_ratio": 5.3375, "reg_tokens": 4, "init_values": 1e-5, **SWIGLU},
                 "vit_huge", {"patch_size": 14, "num_register_tokens": 4, "ffn_layer": "swiglufused",
                              "init_values": 1.0}),
    "UNI-2": ("vit_giant_patch14_224", {"depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2,
                                        "reg_tokens": 8, "no_embed_class": True, "init_values": 1e-5, **SWIGLU},
              "vit_giant2", {"depth": 24, "patch_size": 14, "num_register_tokens": 8, "ffn_layer": "swiglufused",
                             "init_values": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("published", FULL_SIZE)
def test_architectures_to_start_from(published: str):
    """A student's tensors are those of the published models, whose arguments are their cards'."""
    name, options, arch, ours = FULL_SIZE[published]
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0, **options).state_dict()
        model = BACKBONES[arch](**ours)
    state, _ = starting_state(model, theirs)
    check_shapes(model, state, published)


@pytest.mark.parametrize("outer", ["", "model.backbone.", "teacher.backbone.", "module.encoder."])
@torch.no_grad()
def test_wrappers_and_heads(outer: str, tmp_path: Path):
    """iBOT's name of the mask token, a head beside the backbone, and whatever a loop saves around them."""
    ours = random_backbone(embed_dim=128, depth=2, patch_size=16, img_size=64, init_values=None).float()
    state = ours.state_dict()
    state["masked_embed"] = state.pop("mask_token")
    head = {f"{outer.rpartition('.backbone')[0]}.head.weight".lstrip("."): torch.zeros(3, 128)}
    whole = {f"{outer}{key}": value for key, value in state.items()} | head
    torch.save({"model_state_dict": whole, "epoch": 3}, tmp_path / "checkpoint.pth")
    images, masks = torch.randn(2, 3, 64, 64), torch.rand(2, 16) < 0.5
    found = load_teacher(tmp_path / "checkpoint.pth").forward_features(images, masks)
    torch.testing.assert_close(found["x_norm_patchtokens"], ours.forward_features(images, masks)["x_norm_patchtokens"])
    dinov3 = random_dinov3().float()
    whole = {f"{outer}{key}": value for key, value in dinov3.state_dict().items()} | head
    torch.save({"model_state_dict": whole}, tmp_path / "dinov3.pth")
    torch.testing.assert_close(load_teacher(tmp_path / "dinov3.pth")(images), dinov3(images))
