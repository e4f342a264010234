"""Exports open in timm and transformers and compute there what the teacher computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from dinov2.data.augment.normalize import normalize
from dinov2.export import main
from dinov2.hub import load_teacher
from dinov2.hub.export.dinov2 import timm_config, transformers_config
from dinov2.hub.layouts import to_timm, to_transformers, vit_arguments
from dinov2.hub.pixels import Colours
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_giant2
from tests.helpers.backbones import random_backbone, timm_weights, transformers_weights

COLOURS = Colours((0.7, 0.6, 0.8), (0.2, 0.3, 0.25))
SIZES = {"own grid": (98, 98), "resampled": (56, 56), "oblong": (42, 70)}


def teacher_file(folder: Path, registers: int, ffn_layer: str, antialias: bool = True) -> tuple[Path, nn.Module]:
    """A teacher of 98 px with a JSON beside it, and its backbone in float64."""
    teacher = random_backbone(
        img_size=98, num_register_tokens=registers, ffn_layer=ffn_layer,
        interpolate_antialias=antialias, interpolate_offset=0.0,
    )  # fmt: skip
    state = {f"backbone.{key}": value.float() for key, value in teacher.state_dict().items()}
    torch.save({"teacher": state}, folder / "teacher.pth")
    stated = {
        "img_size": 98, "patch_size": 14, "embed_dim": 96, "depth": 3, "num_heads": 4, "init_values": 1.0,
        "num_register_tokens": registers, "ffn_layer": ffn_layer, "interpolate_antialias": antialias,
        "interpolate_offset": 0.0,
    }  # fmt: skip
    (folder / "teacher.json").write_text(json.dumps({"architecture": stated}))
    return folder / "teacher.pth", teacher


def exported(path: Path, target: str, *options: str) -> Path:
    folder = path.with_name(target)
    assert main(["--checkpoint", str(path), "--format", target, "--output", str(folder), *options]) == 0
    return folder


def tokens_of(teacher: nn.Module, images: Tensor) -> Tensor:
    out = teacher.forward_features(images)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]], dim=1)


@pytest.mark.parametrize("registers", [0, 4, 2])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@torch.no_grad()
def test_timm(ffn_layer, registers, tmp_path):
    path, teacher = teacher_file(tmp_path, registers, ffn_layer)
    folder = exported(path, "timm")
    config = json.loads((folder / "config.json").read_text())
    by_hand = timm.create_model(config["architecture"], **config["model_args"])
    by_hand.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    from_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(by_hand.state_dict(), from_folder.state_dict(), rtol=0, atol=0)
    state = teacher.state_dict()
    expected = {key: value.float() for key, value in timm_weights(state).items()}
    if not registers:  # timm adds positions to the class token, too
        expected |= {key: state[key].float() for key in ("cls_token", "pos_embed")}
    torch.testing.assert_close(by_hand.state_dict(), expected, rtol=0, atol=0)
    by_hand.double().eval()
    for size in SIZES.values():
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(by_hand.forward_features(images), tokens_of(teacher, images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@torch.no_grad()
def test_meta_keys_open_in_timm(ffn_layer, registers, tmp_path):
    """Route of stock eva: timm finds out by the mask token that the names are Meta's."""
    path, teacher = teacher_file(tmp_path, registers, ffn_layer)
    folder = exported(path, "meta")
    torch.testing.assert_close(
        torch.load(folder / "backbone.pth"), {k: v.float() for k, v in teacher.state_dict().items()}
    )
    config = timm_config(vit_arguments(teacher), COLOURS)
    theirs = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay={"file": str(folder / "backbone.pth")},
        **config["model_args"],
    ).double().eval()  # fmt: skip
    for size in SIZES.values():
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(theirs.forward_features(images), tokens_of(teacher, images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("registers", [0, 4, 1])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@torch.no_grad()
def test_transformers(ffn_layer, registers, tmp_path):
    path, teacher = teacher_file(tmp_path, registers, ffn_layer, antialias=registers > 0)
    folder = exported(path, "hf")
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    expected = {key: value.float() for key, value in transformers_weights(teacher.state_dict()).items()}
    torch.testing.assert_close(load_file(folder / "model.safetensors"), expected, rtol=0, atol=0)
    theirs.double().eval()
    for size in SIZES.values():
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        out = theirs(images)
        torch.testing.assert_close(out.last_hidden_state, tokens_of(teacher, images), rtol=0, atol=1e-12)
        torch.testing.assert_close(out.pooler_output, teacher(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("target", ["meta", "timm", "hf"])
@torch.no_grad()
def test_exports_open_here_again(target, registers, tmp_path):
    path, teacher = teacher_file(tmp_path, registers, "swiglufused", antialias=target != "hf" or registers > 0)
    name = "backbone.pth" if target == "meta" else "model.safetensors"
    again = load_teacher(exported(path, target) / name).double()
    for size in SIZES.values():
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(tokens_of(again, images), tokens_of(teacher, images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "name", "relative"), [("fp16", "float16", 5e-3), ("bf16", "bfloat16", 4e-2)])
@torch.no_grad()
def test_half_precision(dtype, name, relative, tmp_path):
    path, teacher = teacher_file(tmp_path, 4, "mlp")
    images = torch.randn(2, 3, 98, 98, dtype=torch.float64)
    expected = tokens_of(teacher, images)
    folder = exported(path, "hf", "--dtype", dtype)
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert theirs.dtype is getattr(torch, name)
    difference = theirs.double().eval()(images).last_hidden_state - expected
    assert 0 < difference.abs().max() < relative * expected.abs().max()
    folder = exported(path, "timm", "--dtype", dtype)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, name)}
    # The class token and its position are rounded once, after they are added.
    state = teacher.state_dict()
    folded = (state["cls_token"] + state["pos_embed"][:, :1]).to(getattr(torch, name))
    assert torch.equal(weights["cls_token"], folded)


def test_images_are_prepared_as_in_training(tmp_path):
    path, _ = teacher_file(tmp_path, 4, "mlp")
    options = [
        "--mean", *map(str, COLOURS.mean), "--std", *map(str, COLOURS.std), "--image-size", "56"
    ]  # fmt: skip
    tile = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    expected = normalize(torch.from_numpy(tile).permute(2, 0, 1)[None], COLOURS.mean, COLOURS.std)
    folder = exported(path, "hf", *options)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    torch.testing.assert_close(
        processor(Image.fromarray(tile), return_tensors="pt")["pixel_values"], expected, rtol=0, atol=1e-5
    )
    wide = processor(Image.fromarray(np.zeros((112, 224, 3), np.uint8)), return_tensors="pt")
    assert wide["pixel_values"].shape == (1, 3, 56, 56)
    model = timm.create_model(f"local-dir:{exported(path, 'timm', *options)}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(transform(Image.fromarray(tile))[None], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_resampled_grid_needs_no_agreement_on_resampling(tmp_path):
    """Meta's setting without registers, which transformers and timm cannot reproduce, at one size of images."""
    teacher = random_backbone(img_size=98, interpolate_antialias=False, interpolate_offset=0.1)
    torch.save(teacher.float().state_dict(), tmp_path / "teacher.pth")
    stated = vit_arguments(teacher)
    (tmp_path / "teacher.json").write_text(json.dumps({"architecture": stated}))
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    expected = tokens_of(teacher.double(), images)
    as_is = transformers.AutoModel.from_pretrained(exported(tmp_path / "teacher.pth", "hf")).double().eval()
    assert (as_is(images).last_hidden_state - expected).abs().max() > 0.01
    (tmp_path / "hf").rename(tmp_path / "98px")
    fitted = exported(tmp_path / "teacher.pth", "hf", "--image-size", "56")
    model = transformers.AutoModel.from_pretrained(fitted).double().eval()
    torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=0, atol=1e-5)
    fitted = exported(tmp_path / "teacher.pth", "timm", "--image-size", "56")
    model = timm.create_model(f"local-dir:{fitted}", pretrained=True).double().eval()
    torch.testing.assert_close(model.forward_features(images), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def giant() -> DinoVisionTransformer:
    with torch.device("meta"):
        return vit_giant2(
            patch_size=14, img_size=224, num_register_tokens=4, init_values=1.0, ffn_layer="swiglufused",
            interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip


def test_full_size_in_timm(giant):
    config = timm_config(vit_arguments(giant), COLOURS)
    assert config["architecture"] == "vit_giant_patch14_reg4_dinov2"
    assert config["model_args"] == {"img_size": 224, "dynamic_img_size": True}
    with torch.device("meta"):
        theirs = timm.create_model(config["architecture"], **config["model_args"]).state_dict()
    weights = to_timm(giant.state_dict())
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in theirs.items()}
    assert len(weights) == 567
    assert round(sum(value.numel() for value in weights.values()) / 1e6, 3) == 1134.774


def test_full_size_in_transformers(giant, tmp_path):
    config = transformers_config(vit_arguments(giant), torch.float32)
    assert config["model_type"] == "dinov2_with_registers"
    weights = to_transformers(giant.state_dict())
    # Shapes of the model in memory; it splits what the files hold in one.
    with torch.device("meta"):
        theirs = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))
    numbers = sum(value.numel() for value in weights.values())
    assert numbers == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(numbers / 1e6, 3) == 1134.777
    assert len(theirs.state_dict()) == 808 == len(weights) + 2 * 40
    for key, value in theirs.state_dict().items():
        assert value.shape == weights.get(key, value).shape, key
    # Names of the files, which transformers writes for a narrow model of as many layers.
    narrow = transformers.Dinov2WithRegistersConfig(**{**config, "hidden_size": 24, "image_size": 28})
    transformers.Dinov2WithRegistersModel(narrow).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("prefix", ["", "dinov2_with_registers.", "dinov2."])
@torch.no_grad()
def test_names_of_transformers_in_memory(prefix, swiglu, registers, tmp_path):
    """A state dict of transformers 5 saved by torch, with the prefix that models with heads give it."""
    options = {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
        "image_size": 70, "use_swiglu_ffn": swiglu,
    }  # fmt: skip
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**options)
    theirs = getattr(transformers, f"{kind}Model")(config).double().eval()
    state = {prefix + key: torch.randn_like(value).mul(0.2).float() for key, value in theirs.state_dict().items()}
    theirs.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    classifier = {"classifier.weight": torch.zeros(2, 256)} if prefix else {}
    torch.save({"state_dict": state | classifier}, tmp_path / "model.bin")
    ours = load_teacher(tmp_path / "model.bin").double()
    for size in SIZES.values():
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(tokens_of(ours, images), theirs(images).last_hidden_state, rtol=0, atol=1e-6)
