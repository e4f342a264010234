"""Weights are found by path, folder and id on the hub."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from dinov2.hub import load_teacher, trained_with
from dinov2.hub.locate import check_found, teacher_file, weights_path
from dinov2.hub.pretrained import read_checkpoint
from dinov2.models.vision_transformer import vit_demo
from tests.helpers.backbones import randomise, transformers_weights
from tests.helpers.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that this process asks, with a cache of its own."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def model_folder(folder: Path, split: bool = False) -> torch.nn.Module:
    """A folder as transformers writes it, in one file or two."""
    folder.mkdir()
    model = randomise(vit_demo(patch_size=14, img_size=28, init_values=1.0, interpolate_offset=0.0)).eval()
    state = transformers_weights(model.state_dict())
    if split:
        index = {key: f"model-{1 + number % 2}.safetensors" for number, key in enumerate(state)}
        for part in set(index.values()):
            save_file({key: state[key] for key in state if index[key] == part}, folder / part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return model


def outputs_equal(name: str, model: torch.nn.Module) -> bool:
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        return torch.equal(load_teacher(name)(images), model(images))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folders(prefix, split, tmp_path):
    model = model_folder(tmp_path / "model", split)
    name = f"{prefix}{tmp_path / 'model'}"
    assert outputs_equal(name, model)
    assert trained_with(name) == {"mean": [0.5] * 3, "std": [0.25] * 3}


def test_the_only_file_of_a_folder(tmp_path):
    torch.save(vit_demo(patch_size=14, img_size=28).state_dict(), tmp_path / "any.pt")
    assert weights_path(str(tmp_path)) == tmp_path / "any.pt"
    (tmp_path / "other.pth").touch()
    with pytest.raises(IsADirectoryError, match=r"any.pt, other.pth"):
        weights_path(str(tmp_path))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_ids_on_the_hub(hub, split, tmp_path):
    model = model_folder(tmp_path / "model", split)
    commit = hub.push("org/model", tmp_path / "model")
    for name in ("org/model", "hf-hub:org/model", "hf_hub:org/model@main", "hf://org/model", f"org/model@{commit}"):
        assert outputs_equal(name, model)
    assert trained_with("org/model") == {"mean": [0.5] * 3, "std": [0.25] * 3}
    file = "model.safetensors.index.json" if split else "model.safetensors"
    assert read_checkpoint(f"hf://org/model/{file}").keys() == read_checkpoint("org/model").keys()


def test_a_hub_that_is_out_of_reach_later(hub, monkeypatch, tmp_path):
    model = model_folder(tmp_path / "model")
    hub.push("org/model", tmp_path / "model")
    assert outputs_equal("org/model", model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert outputs_equal("org/model", model)
    with pytest.raises(FileNotFoundError, match="org/other"):
        weights_path("org/other")


def test_looking_for_weights_downloads_none(hub, tmp_path):
    model_folder(tmp_path / "model")
    hub.push("org/model", tmp_path / "model")
    check_found("org/model")
    check_found("hf://org/model/model.safetensors")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_is_here_wins_over_the_hub(hub, monkeypatch, tmp_path):
    model_folder(tmp_path / "hub")
    hub.push("org/model", tmp_path / "hub")
    (tmp_path / "org").mkdir()
    model = model_folder(tmp_path / "org/model")
    monkeypatch.chdir(tmp_path)
    assert outputs_equal("org/model", model) and not hub.requests


@pytest.mark.parametrize("name", ["org/none", "org/model@none", "hf://org/model/none.pth", "hf://org/no weights"])
def test_what_the_hub_has_not(hub, name, tmp_path):
    model_folder(tmp_path / "model")
    hub.push("org/model", tmp_path / "model")
    with pytest.raises(FileNotFoundError) as error:
        read_checkpoint(name)
    with pytest.raises(FileNotFoundError):
        check_found(name)
    assert "\n" not in str(error.value) and name.split("@")[0].split("/")[-1] in str(error.value)


def test_paths_of_files_do_not_ask_the_hub(hub):
    for name in ("out/teacher.pth", "/no/such", "a/b/c", "teacher"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_checkpoint(name)
    assert not hub.requests


@pytest.mark.parametrize(("place", "step"), [("", 12), ("eval", 12), ("eval/training_9", 9)])
def test_a_run_stands_for_its_newest_teacher(tmp_path, place: str, step: int):
    for number in (9, 12, 3):
        folder = tmp_path / f"run/eval/training_{number}"
        folder.mkdir(parents=True)
        (folder / "teacher_checkpoint.pth").touch()
        (folder / "teacher_checkpoint.json").write_text(json.dumps({"step": number}))
    name = str(tmp_path / "run" / place)
    teacher = tmp_path / f"run/eval/training_{step}/teacher_checkpoint.pth"
    assert weights_path(name) == teacher
    assert trained_with(name)["step"] == step
    assert Path(teacher_file(name)) in (teacher, teacher.parent)


def test_a_run_without_a_teacher(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError):
        teacher_file(str(tmp_path))
    assert teacher_file("org/name") == "org/name"
