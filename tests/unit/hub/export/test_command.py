"""`python -m dinov2.export`: what it writes, what it refuses in one sentence, and what --verify finds."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dinov2.export as command
import dinov2.hub.export.transformers as transformers_files
from dinov2.export import main, save_teacher
from dinov2.hub.layouts import vit_arguments
from dinov2.models.vision_transformer import vit_demo
from dinov2.utils.cli import USER_ERROR
from tests.helpers.backbones import randomise, transformers_weights
from tests.helpers.checkpoints import forget
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parents[4]
FILES = {
    "meta": {"README.md", "backbone.pth", "backbone.json"},
    "timm": {"README.md", "model.safetensors", "config.json"},
    "hf": {"README.md", "model.safetensors", "config.json", "preprocessor_config.json"},
}


def save(folder: Path, config: dict | None = None, **options) -> Path:
    """A demo teacher as training exports it, of 42 px."""
    options = {
        "patch_size": 14, "img_size": 42, "num_register_tokens": 4, "init_values": 1.0,
        "interpolate_antialias": True, "interpolate_offset": 0.0, **options,
    }  # fmt: skip
    teacher = randomise(vit_demo(**options))
    metadata = {"architecture": {"arch": "vit_demo", **options}, "step": 7, "config": config or {}}
    save_teacher(folder / "teacher.pth", {"backbone": teacher.state_dict()}, metadata)
    return folder / "teacher.pth"


def run(path: Path, target: str, *options: str) -> int:
    output = ["--output", str(path.with_name("out"))]
    return main(["--checkpoint", str(path), "--format", target, *output, *options])


def refusal(caplog, path: Path, target: str = "hf", *options: str) -> str:
    """The one sentence with which nothing is written."""
    with caplog.at_level(logging.ERROR, "dinov2"):
        logging.getLogger("dinov2").addHandler(caplog.handler)
        original, command.setup_logging = command.setup_logging, lambda: None
        try:
            assert run(path, target, *options) == USER_ERROR
        finally:
            command.setup_logging = original
            logging.getLogger("dinov2").removeHandler(caplog.handler)
    (message,) = {record.getMessage() for record in caplog.records if record.levelno == logging.ERROR}
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("target", FILES)
def test_files(target, tmp_path, capsys):
    path = save(tmp_path)
    assert run(path, target) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES[target]
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    assert capsys.readouterr().out.startswith("wrote ")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}
    assert run(path, target) == 0
    assert capsys.readouterr().out.startswith("already there: ")
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("target", FILES)
def test_nothing_is_overwritten(target, tmp_path, caplog):
    path = save(tmp_path)
    assert run(path, target) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "exists already with other contents" in refusal(caplog, path, target, "--dtype", "fp16")
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_a_strangers_file_is_left_alone_and_nothing_beside_it(tmp_path, caplog):
    path = save(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("mine")
    assert "config.json' exists already" in refusal(caplog, path, "timm")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out/config.json").read_text() == "mine"


def test_meta_export_keeps_what_is_known_of_the_teacher(tmp_path):
    path = save(tmp_path)
    run(path, "meta", "--dtype", "bf16")
    described = json.loads((tmp_path / "out/backbone.json").read_text())
    assert described["step"] == 7 and described["architecture"]["num_heads"] == 4
    weights = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    assert "mask_token" in weights and weights["norm.weight"].dtype is torch.bfloat16
    assert not any(key.startswith(("teacher", "backbone")) for key in weights)


def test_transformers_files(tmp_path):
    """Version 4's names, and the fields that loading depends on."""
    path = save(tmp_path, {"augmentation": {"normalize_mean": [0.5] * 3, "normalize_std": [0.25] * 3}})
    run(path, "hf", "--dtype", "fp16")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as weights:
        names, metadata = set(weights.keys()), weights.metadata()
    state = torch.load(path, weights_only=True)["teacher"]
    state = {key.removeprefix("backbone."): value for key, value in state.items()}
    assert names == transformers_weights(state).keys()
    assert metadata["format"] == "pt"
    config = json.loads((tmp_path / "out/config.json").read_text())
    wanted = {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14, "image_size": 42,
        "mlp_ratio": 4, "use_swiglu_ffn": False, "num_register_tokens": 4, "layer_norm_eps": 1e-6,
        "torch_dtype": "float16",
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 42} and processor["crop_size"] == {
        "height": 42,
        "width": 42,
    }
    assert processor["image_mean"] == [0.5] * 3 and processor["image_std"] == [0.25] * 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("target", FILES)
def test_verified(target, dtype, tmp_path, capsys):
    path = save(tmp_path)
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tiles / f"{i}.png")
    (tiles / "notes.txt").write_text("no image")
    assert run(path, target, "--dtype", dtype, "--verify", str(tiles)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(", ", 1)[1] for line in lines[1:]] == [
        "3 tiles of 42 px",
        "3 tiles of 28 px",
    ]
    assert all("largest difference" in line and "least cosine" in line for line in lines[1:])


def test_verified_on_the_micrograph(tmp_path, capsys):
    assert run(save(tmp_path), "hf", "--verify") == 0
    assert "transformers, 4 tiles of 42 px" in capsys.readouterr().out


def test_verify_finds_exchanged_tensors(tmp_path, monkeypatch, capsys):
    right = transformers_files.to_transformers

    def exchanged(state):
        names = right(state)
        for kind in ("weight", "bias"):
            query, key = (f"encoder.layer.1.attention.attention.{part}.{kind}" for part in ("query", "key"))
            names[query], names[key] = names[key], names[query]
        return names

    monkeypatch.setattr(transformers_files, "to_transformers", exchanged)
    for dtype in ("fp32", "bf16"):
        path = save(tmp_path / dtype)
        assert run(path, "hf", "--verify", "--dtype", dtype) == 1
        assert "transformers disagrees: a difference of at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "registers", "antialias", "offset", "warned"),
    [
        ("timm", 4, True, 0.0, None),
        (
            "timm",
            4,
            False,
            0.1,
            "timm resamples positions with antialias=True, offset=0.0, this teacher with",
        ),
        ("timm", 0, False, 0.1, "antialias=True, offset=0.0, this teacher with antialias=False, offset=0.1"),
        ("hf", 4, True, 0.1, "transformers resamples positions with antialias=True, offset=0.0"),
        ("hf", 0, True, 0.0, "transformers resamples positions with antialias=False, offset=0.0"),
        ("hf", 0, False, 0.0, None),
        ("meta", 0, False, 0.1, None),
        ("meta", 4, False, 0.1, "Meta's model resamples positions with antialias=True, offset=0.0"),
    ],
)
def test_other_resampling_is_announced(target, registers, antialias, offset, warned, tmp_path, capsys):
    path = save(tmp_path, num_register_tokens=registers, interpolate_antialias=antialias, interpolate_offset=offset)
    assert run(path, target) == 0
    said = capsys.readouterr().err
    assert warned in said and "--image-size" in said if warned else said == ""


def test_image_size(tmp_path, capsys):
    assert run(save(tmp_path), "timm", "--image-size", "70", "--verify") == 0
    assert "4 tiles of 70 px" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 70, 70]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("timm", {"ffn_layer": "identity"}, "DINOv2 in timm has feed-forward layers, this teacher has none"),
        ("hf", {"init_values": None}, "DINOv2 in transformers has LayerScale, this teacher has none"),
        ("timm", {"ffn_bias": False}, "proj_bias and ffn_bias both or neither"),
        ("hf", {"proj_bias": False}, "Transformers' DINOv2 has proj_bias and ffn_bias"),
        ("hf", {"mlp_ratio": 2.5}, "Transformers' mlp_ratio is a whole number, this teacher's is 2.5"),
    ],
)
def test_architectures_that_a_format_lacks(target, options, message, tmp_path, caplog):
    assert message in refusal(caplog, save(tmp_path, **options), target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"proj_bias": False, "ffn_bias": False},
        {"mlp_ratio": 2.5},
        {"in_chans": 4, "patch_size": 7},
    ],
    ids=repr,
)
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
@torch.no_grad()
def test_unusual_architectures_in_timm(ffn_layer, options, tmp_path):
    import timm

    path = save(tmp_path, ffn_layer=ffn_layer, **options)
    assert run(path, "timm") == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = vit_demo(
        img_size=42, num_register_tokens=4, init_values=1.0, ffn_layer=ffn_layer, **{"patch_size": 14, **options}
    ).eval()  # fmt: skip
    state = torch.load(path, weights_only=True)["teacher"]
    ours.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()})
    images = torch.randn(2, options.get("in_chans", 3), 42, 42)
    torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--image-size", "50"],
            "The image size is 50; a positive multiple of the patch's 14 px is expected",
        ),
        (["--image-size", "0"], "The image size is 0"),
        (["--std", "1", "0", "1"], "does not normalise values in"),
        (["--mean", "124", "116", "104"], "does not normalise values in"),
        (["--verify", "/no/tiles"], "Tiles '/no/tiles' are not there; a folder of .png"),
    ],
)
def test_wrong_options(options, message, tmp_path, caplog):
    assert message in refusal(caplog, save(tmp_path), "hf", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mean", ["grey", [0.5], [0.5, "a", 0.5], 0.5], ids=repr)
def test_wrong_colours_beside_the_teacher(mean, tmp_path, caplog):
    path = save(tmp_path, {"augmentation": {"normalize_mean": mean}})
    assert "does not normalise values in" in refusal(caplog, path)


def test_tiles_that_cannot_be_decoded(tmp_path, caplog):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles/a.png").write_bytes(b"\x89PNG\r\n\x1a\nshort")
    said = refusal(caplog, save(tmp_path), "hf", "--verify", str(tmp_path / "tiles"))
    assert "a.png' cannot be decoded" in said


@pytest.mark.parametrize(("target", "library"), [("meta", "timm"), ("timm", "timm"), ("hf", "transformers")])
def test_library_that_is_not_installed(target, library, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dinov2.hub.export.command.find_spec", lambda name: None)
    said = refusal(caplog, save(tmp_path), target, "--verify")
    assert f"--verify of --format {target} needs {library}, which is not installed" in said
    assert run(tmp_path / "teacher.pth", target) == 0  # the export itself needs neither


def test_output_that_is_a_file(tmp_path, caplog):
    path = save(tmp_path)
    (tmp_path / "out").write_text("")
    assert "out' is a file; name a new or empty folder" in refusal(caplog, path)


def test_output_that_cannot_be_made(tmp_path, caplog):
    path = save(tmp_path)
    (tmp_path / "file").write_text("")
    said = refusal(caplog, path, "hf", "--output", str(tmp_path / "file/out"))
    assert "out' cannot be written (" in said and "make room or mend the folder" in said


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_weights_that_the_dtype_cannot_hold(value, tmp_path, caplog):
    path = save(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["teacher"]["backbone.norm.bias"][3] = value
    torch.save(checkpoint, path)
    forget(path)
    said = refusal(caplog, path, "meta", "--dtype", "fp16")
    assert "norm.bias" in said and "not finite" in said


@pytest.mark.parametrize("kind", ["folder", "absent", "no backbone", "stated otherwise"])
def test_checkpoints_that_are_no_teacher(kind, tmp_path, caplog):
    path = save(tmp_path)
    if kind == "folder":
        message, path = "is a folder; name the .pth or .safetensors file in it", tmp_path / "sub/x"
        path.mkdir(parents=True)
    elif kind == "absent":
        message, path = "does not exist; give a .pth", tmp_path / "none.pth"
    elif kind == "no backbone":
        message = "hold no backbone: cls_token, pos_embed, patch_embed.proj.weight missing; a DINOv2 or DINOv3 ViT"
        torch.save({"teacher": {"dino_head.mlp.0.weight": torch.zeros(2, 2)}}, path)
        forget(path)
    else:
        message = "do not fit the model: they have 4 registers, the model 0 registers"
        stated = {"arch": "vit_demo", "patch_size": 14, "init_values": 1.0}
        path.with_suffix(".json").write_text(json.dumps({"architecture": stated}))
    assert message in refusal(caplog, path)


def test_command_line(tmp_path):
    path = save(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "dinov2.export", "--checkpoint", path, "--format", "meta", "--output"]
    done = subprocess.run([*line, tmp_path / "a"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == f"wrote README.md, backbone.json, backbone.pth in {tmp_path / 'a'}\n"


def test_arguments_make_the_same_model():
    options = {"mlp_ratio": 2.6, "ffn_layer": "swiglufused", "num_register_tokens": 3, "init_values": None}
    with torch.device("meta"):
        model = vit_demo(patch_size=14, img_size=42, **options)
        again = type(model)(**vit_arguments(model))
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]


def test_pushed_with_the_token_nowhere(tmp_path, monkeypatch, capsys):
    token = "hf_stand_in_token"
    with HubServer() as hub:
        hub.writers.add(token)
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_TOKEN", token), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        path = save(tmp_path)
        assert run(path, "timm", "--push", "org/teacher", "--license", "cc-by-4.0") == 0
        _, there = hub.find("org/teacher", "main")
        sent = {file.name: file.read_bytes() for file in there.iterdir()}
        written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        assert {name: sent[name] for name in FILES["timm"]} == written
        other = save(tmp_path / "other")
        assert run(other, "timm", "--push", "org/teacher", "--mean", ".5", ".5", ".5") == USER_ERROR
        assert hub.requests["commit"] == 1 and hub.tokens_seen == {token}
    said = capsys.readouterr()
    assert not any(token.encode() in content for content in written.values())
    assert token not in said.out + said.err and f"{hub.url}/org/teacher" in said.out


@pytest.mark.parametrize("options", [["--private"], ["--replace"], ["--revision", "v2"]], ids=repr)
def test_options_of_push_alone(options, tmp_path, caplog):
    refusal(caplog, save(tmp_path), "meta", *options)
    assert not (tmp_path / "out").exists()
