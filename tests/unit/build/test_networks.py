"""Starting weights as a configuration names them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinov2.build.networks import load_starting_weights, try_starting_weights
from dinov2.configs import Config, load_config
from dinov2.hub.pretrained import needs_download
from dinov2.layers import DINOHead
from dinov2.models import build_model_from_cfg
from tests.helpers.backbones import randomise, transformers_weights
from tests.helpers.runs import TINY


def tiny(*overrides: str) -> Config:
    return load_config(None, [*TINY, "data.path=unused", *overrides])


def network(config: Config, seed: int) -> nn.ModuleDict:
    """Backbone and head of a run, with random weights."""
    torch.manual_seed(seed)
    backbone, width = build_model_from_cfg(config, only_teacher=True)
    head = DINOHead(width, 16, hidden_dim=8, bottleneck_dim=4)
    return randomise(nn.ModuleDict({"backbone": backbone, "dino_head": head}))


@pytest.fixture
def export(tmp_path: Path) -> tuple[Path, nn.ModuleDict]:
    trained = network(tiny(), 1)
    torch.save({"teacher": trained.state_dict()}, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth", trained


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
@pytest.mark.parametrize("positions", [True, False])
def test_what_is_taken_from_an_export(key: str, positions: bool, export: tuple[Path, nn.ModuleDict]):
    path, trained = export
    config = tiny(f"{key}={path}", f"student.pretrained_pos_embed={str(positions).lower()}")
    fresh = network(config, 2)
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    load_starting_weights(fresh, config)
    for name, value in fresh.state_dict().items():
        kept = not positions if name == "backbone.pos_embed" else "head" in name and key != "MODEL.WEIGHTS"
        assert torch.equal(value, start[name] if kept else trained.state_dict()[name]), name


@pytest.mark.parametrize("wrapped", [{}, {"student": None}], ids=["teacher", "student before it"])
def test_a_backbone_that_is_no_vit(wrapped: dict, tmp_path: Path):
    overrides = ("student.arch=tests.helpers.toys:Patches", f"MODEL.WEIGHTS={tmp_path / 'teacher.pth'}")
    trained, other, fresh = (network(tiny(*overrides), seed) for seed in (1, 2, 3))
    saved = {name: other.state_dict() for name in wrapped} | {"teacher": trained.state_dict()}
    torch.save(saved, tmp_path / "teacher.pth")
    load_starting_weights(fresh, tiny(*overrides))
    torch.testing.assert_close(fresh.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_a_folder_of_transformers(tmp_path: Path):
    config = tiny(f"student.pretrained_weights={tmp_path}")
    trained, fresh = network(config, 1), network(config, 2)
    save_file(transformers_weights(trained.backbone.state_dict()), tmp_path / "model.safetensors")
    load_starting_weights(fresh, config)
    torch.testing.assert_close(fresh.backbone.state_dict(), trained.backbone.state_dict(), rtol=0, atol=0)


def test_a_head_that_is_not_finite(export: tuple[Path, nn.ModuleDict]):
    path, trained = export
    trained.dino_head.mlp[0].bias.data[2] = float("inf")
    torch.save({"teacher": trained.state_dict()}, path)
    config = tiny(f"MODEL.WEIGHTS={path}")
    with pytest.raises(ValueError, match=r"teacher.pth.* dino_head.mlp.0.bias"):
        load_starting_weights(network(config, 2), config)


@pytest.mark.parametrize("positions", ["true", "false"])
def test_weights_are_tried_without_keeping_them(export: tuple[Path, nn.ModuleDict], positions: str):
    path, _ = export
    config = tiny(f"MODEL.WEIGHTS={path}", f"student.pretrained_pos_embed={positions}")
    (sentence,) = try_starting_weights(network(config, 2).to("meta"), None, config)
    assert str(path) in sentence and "dino_head" in sentence
    (sentence,) = try_starting_weights(network(config, 2).to("meta"), None, tiny())
    assert str(path) not in sentence


@pytest.mark.parametrize("fault", ["missing", "shape", "infinite", "head", "no weights"])
def test_weights_that_are_tried_are_opened(export: tuple[Path, nn.ModuleDict], fault: str):
    path, trained = export
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    if fault == "missing":
        del state["backbone.norm.bias"]
    elif fault == "shape":
        state["backbone.norm.bias"] = torch.zeros(3)
    elif fault == "infinite":
        state["backbone.norm.bias"][0] = float("inf")
    elif fault == "head":
        state["dino_head.mlp.0.bias"] = torch.zeros(3)
    torch.save({"teacher": state}, path)
    if fault == "no weights":
        path.write_text("<html>404</html>")
    config = tiny(f"MODEL.WEIGHTS={path}")
    with pytest.raises(ValueError, match=r"teacher\.pth"):
        try_starting_weights(network(config, 2).to("meta"), None, config)


def test_what_has_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "https://localhost/weights/w.pth"
    assert needs_download(url) and needs_download("org/name") and needs_download("hf://org/name/w.pth")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "w.pth").touch()
    assert not any(map(needs_download, (url, f"file://{tmp_path}/w.pth", str(tmp_path), "absent/w.pth")))
