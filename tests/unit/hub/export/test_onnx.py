"""Networks in ONNX, run by ONNX Runtime, beside the backbones they are of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dinov2.export import main, save_teacher
from dinov2.models.dinov3 import Dinov3VisionTransformer
from dinov2.models.vision_transformer import vit_demo
from dinov2.utils.files import checksum
from tests.helpers.backbones import randomise

BACKBONES = {
    "DINOv2": (
        vit_demo,
        {"arch": "vit_demo", "patch_size": 14, "img_size": 42, "num_register_tokens": 4, "init_values": 1.0,
         "ffn_layer": "swiglufused", "interpolate_antialias": True, "interpolate_offset": 0.0},
    ),
    "DINOv2 without registers": (
        vit_demo,
        {"arch": "vit_demo", "patch_size": 14, "img_size": 28, "init_values": None, "interpolate_offset": 0.1},
    ),
    "DINOv3": (
        Dinov3VisionTransformer,
        {"arch": "dinov3_vit", "patch_size": 16, "img_size": 48, "embed_dim": 64, "depth": 2, "num_heads": 2,
         "n_storage_tokens": 4, "ffn_layer": "swiglu64", "mask_k_bias": True, "norm_layer": "layernormbf16",
         "pos_embed_rope_rescale_coords": 2.0, "untie_cls_and_patch_norms": True,
         "untie_global_and_local_cls_norm": True},
    ),
}  # fmt: skip


def save(folder: Path, name: str) -> tuple[Path, nn.Module]:
    """A teacher's file and its backbone, float64."""
    make, stated = BACKBONES[name]
    backbone = randomise(make(**{key: value for key, value in stated.items() if key != "arch"})).eval()
    save_teacher(folder / "teacher.pth", {"backbone": backbone.state_dict()}, {"architecture": stated, "step": 7})
    return folder / "teacher.pth", backbone.double()


def exported(path: Path, *options: str) -> Path:
    folder = path.with_name("out")
    assert main(["--checkpoint", str(path), "--format", "onnx", "--output", str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_all_tokens_for_batches_of_any_size(name: str, tmp_path: Path):
    path, backbone = save(tmp_path, name)
    folder = exported(path, "--verify")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    side = BACKBONES[name][1]["img_size"]
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, side, side)
        tokens, class_token = session.run(None, {"pixel_values": images.numpy()})
        ours = backbone.forward_features(images.double())
        parts = ours["x_norm_clstoken"][:, None], ours["x_norm_regtokens"], ours["x_norm_patchtokens"]
        expected = torch.cat(parts, dim=1).numpy()
        np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(class_token, tokens[:, 0])


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    path, _ = save(tmp_path, "DINOv2")
    folder = exported(path)
    names = {"README.md", "model.json", "model.onnx", "preprocessor_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    described = json.loads((folder / "model.json").read_text())
    assert described["step"] == 7 and described["checksums"]["weights"] == checksum(folder / "model.onnx")
    assert str(Path(__file__).parents[4]).encode() not in (folder / "model.onnx").read_bytes()
    capsys.readouterr()
    exported(path)
    assert capsys.readouterr().out.startswith("already there: ")


def test_large_weights_are_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As torch's exporter writes them above 1.5 GB."""
    save_program = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save_program(self, path, external_data=True))
    path, _ = save(tmp_path, "DINOv3")
    folder = exported(path, "--verify")
    assert (folder / "model.onnx.data").stat().st_size > (folder / "model.onnx").stat().st_size


def test_half_precision(tmp_path: Path):
    path, _ = save(tmp_path, "DINOv3")
    folder = exported(path, "--dtype", "fp16", "--verify")
    types = {tensor.data_type for tensor in onnx.load(folder / "model.onnx").graph.initializer if len(tensor.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in types


def test_verify_finds_other_weights(tmp_path: Path):
    path, backbone = save(tmp_path, "DINOv2 without registers")
    folder = exported(path)
    network = onnx.load(folder / "model.onnx")
    norm = next(tensor for tensor in network.graph.initializer if tensor.name.endswith("backbone.norm.bias"))
    norm.raw_data = (np.frombuffer(norm.raw_data, np.float32) + 0.01).astype(np.float32).tobytes()
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(network, other / "model.onnx")
    from dinov2.hub.export import verify
    from dinov2.hub.export.onnx import Onnx
    from dinov2.hub.pixels import Colours

    tiles, layout = verify.read_tiles(None), Onnx()
    ours = verify.tokens(backbone, tiles, 28, Colours())
    for place, holds in ((folder, True), (other, False)):
        theirs = verify.tokens(layout.opener(backbone, Colours())(place), tiles, 28, Colours())
        assert verify.Agreement(ours, theirs).holds(*layout.tolerances["fp32"]) is holds


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path, _ = save(tmp_path, "DINOv2")
    monkeypatch.setattr("dinov2.hub.export.command.find_spec", lambda name: None if name == missing else object())
    line = ["--checkpoint", str(path), "--format", "onnx", "--output", str(tmp_path / "out"), "--verify"]
    assert main(line) == 2
    assert f"needs {missing}," in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_type_that_it_does_not_multiply(tmp_path: Path):
    path, _ = save(tmp_path, "DINOv2")
    line = ["--checkpoint", str(path), "--format", "onnx", "--output", str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(line) == 2 and not (tmp_path / "out").exists()
