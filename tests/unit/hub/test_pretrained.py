"""Published weights and exports fill a backbone, whatever they are wrapped in."""

import argparse
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from dinov2.hub import load_teacher
from dinov2.hub.pretrained import (
    backbone_state_dict,
    check_found,
    load_pretrained,
    local_weights,
    published_url,
    read_checkpoint,
)
from tests.helpers.backbones import chunked, random_backbone


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def junk(state):
    return {key: value + 1 for key, value in state.items()}


def export(state):
    """Backbone and heads of a teacher, in a training run's chunks."""
    return {**prefixed(chunked(state), "backbone."), "dino_head.mlp.0.weight": torch.zeros(2)}


LAYOUTS = {
    "Meta's file": lambda state: state,
    "chunked": chunked,
    "teacher export": lambda state: {"teacher": export(state)},
    "Meta's training checkpoint": lambda state: {
        "model": {**prefixed(export(state), "teacher."), **prefixed(export(state), "student.")},
        "iteration": 7,
    },
    "teacher in a training checkpoint": lambda state: {"model": {"teacher": export(state)}, "optimizer": {}},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
    "DINO's run": lambda state: {
        "student": {**prefixed(junk(state), "module.backbone."), "module.head.mlp.0.weight": torch.zeros(2)},
        "teacher": {**prefixed(state, "backbone."), "head.mlp.0.weight": torch.zeros(2)},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    },
    "Lightning": lambda state: {
        "state_dict": {**prefixed(state, "model.backbone."), "model.classifier.weight": torch.zeros(2)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
    },
    "student before teacher": lambda state: {
        "state_dict": {
            **prefixed(junk(state), "student_backbone.vit."),
            **prefixed(state, "teacher_backbone.vit."),
            "teacher_head.layers.0.weight": torch.zeros(2),
        }
    },
    "model_state_dict": lambda state: {"model_state_dict": prefixed(state, "module.backbone."), "optimizer": {}},
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.backbone.")},
    "compiled blocks": lambda state: {key.replace("attn", "_orig_mod.attn"): value for key, value in state.items()},
    "head beside": lambda state: {**state, "head.weight": torch.zeros(2), "linear_head.bias": torch.zeros(2)},
    "no mask token": lambda state: {key: value for key, value in state.items() if key != "mask_token"},
    "data-parallel teacher": lambda state: {"teacher": prefixed(state, "module.backbone.")},
}


@pytest.fixture
def teacher():
    return random_backbone(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0).float()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, teacher, tmp_path):
    torch.save(LAYOUTS[layout](teacher.state_dict()), tmp_path / "weights.pth")
    model = random_backbone(num_register_tokens=4).float()
    load_pretrained(model, str(tmp_path / "weights.pth"))
    expected = teacher.state_dict()
    if layout == "no mask token":
        expected["mask_token"] = torch.zeros(1, 96)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def test_weights_that_are_not_finite(teacher, tmp_path):
    model = random_backbone(num_register_tokens=4).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher.pos_embed.data[0, 3, 5] = float("nan")
    torch.save(teacher.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth.* pos_embed"):
        load_pretrained(model, str(tmp_path / "weights.pth"))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    load_pretrained(model, str(tmp_path / "weights.pth"), positions=False)


@pytest.mark.parametrize("registers", [0, 4])
def test_position_grid_is_resampled_as_timm_does(registers, tmp_path):
    published = random_backbone(img_size=518, num_register_tokens=registers).float()
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    model = random_backbone(img_size=224, num_register_tokens=registers).float()
    load_pretrained(model, str(tmp_path / "weights.pth"))
    assert model.pos_embed.shape == (1, 257, 96)
    expected = resample_abs_pos_embed(published.pos_embed, [16, 16], num_prefix_tokens=1, antialias=True)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.cls_token, published.cls_token, rtol=0, atol=0)


def test_position_grid_can_be_left_as_it_starts(teacher, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "weights.pth")
    model = random_backbone(num_register_tokens=4).float()
    start = model.pos_embed.detach().clone()
    load_pretrained(model, str(tmp_path / "weights.pth"), positions=False)
    assert torch.equal(model.pos_embed, start) and not torch.equal(model.pos_embed, teacher.pos_embed)
    assert torch.equal(model.cls_token, teacher.cls_token)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"num_register_tokens": 0}, ["4 registers", "0 registers"]),
        ({"ffn_layer": "swiglufused"}, ["width 384", "width 512"]),
        ({"depth": 4}, ["3 blocks", "4 blocks"]),
        ({"patch_size": 28}, ["14 px", "28 px"]),
        ({"embed_dim": 192}, ["width 96", "width 192"]),
        ({"init_values": 0}, ["LayerScale, the model no LayerScale"]),
        ({"qkv_bias": False}, ["unknown: blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias"]),
        ({"in_chans": 4}, [r"(96, 3, 14, 14) for (96, 4, 14, 14)"]),
    ],
)  # fmt: skip
def test_misfits_are_named_and_change_nothing(change, faults, teacher, tmp_path):
    torch.save(teacher.state_dict(), tmp_path / "weights.pth")
    model = random_backbone(**{"num_register_tokens": 4, **change}).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights.pth' do not fit the model: ") as error:
        load_pretrained(model, str(tmp_path / "weights.pth"))
    assert [fault for fault in faults if fault not in str(error.value)] == []
    assert "\n" not in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_broken_position_grid_is_named(teacher, tmp_path):
    state = teacher.state_dict()
    torch.save({**state, "pos_embed": state["pos_embed"][:, :-3]}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"another shape: pos_embed \(1, 14, 96\) for \(1, 17, 96\)"):
        load_pretrained(teacher, str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("content", [[1, 2], {"teacher": "soon"}, {}, torch.zeros(3)], ids=repr)
def test_files_without_a_backbone(content, teacher, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    assert backbone_state_dict(content) == {}
    with pytest.raises(ValueError, match=r"weights.pth' do not fit the model: .*missing: blocks.0"):
        load_pretrained(teacher, str(tmp_path / "weights.pth"))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"'/no/such/weights.pth' does not exist"):
        read_checkpoint("/no/such/weights.pth")


class Surprise:
    def __reduce__(self):
        return (print, ("arbitrary code",))


@pytest.mark.parametrize("kind", ["text", "truncated", "code"])
def test_unreadable_files(kind, teacher, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(Surprise() if kind == "code" else teacher.state_dict(), path)
    if kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(
        ValueError, match=r"weights.pth' cannot be read \(.*\); (a PyTorch .pth or a .safetensors file|tensors)"
    ) as error:
        read_checkpoint(str(path))
    assert "\n" not in str(error.value)
    assert "arbitrary code" not in capsys.readouterr().out
    if kind == "code":
        assert "builtins.print" in str(error.value)


def test_numbers_of_numpy_beside_weights(teacher, tmp_path):
    beside = {"loss": np.float32(1), "best": np.float64(2), "epoch": np.int64(3)}
    torch.save({"model": teacher.state_dict(), **beside}, tmp_path / "weights.pth")
    assert {name: read_checkpoint(str(tmp_path / "weights.pth"))[name] for name in beside} == beside


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_first_bytes_tell_the_format(save, name, teacher, tmp_path):
    save(teacher.state_dict(), tmp_path / name)
    torch.testing.assert_close(read_checkpoint(str(tmp_path / name)), dict(teacher.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(dtype, teacher, tmp_path):
    torch.save({key: value.to(dtype) for key, value in teacher.state_dict().items()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        load_pretrained(teacher, str(tmp_path / "weights.pth"))


def test_a_mask_token_of_three_dimensions(teacher, tmp_path):
    state = teacher.state_dict()
    torch.save({**state, "mask_token": state["mask_token"][None]}, tmp_path / "weights.pth")
    model = random_backbone(num_register_tokens=4).float()
    load_pretrained(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.mask_token, teacher.mask_token)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that a server on this machine offers, its address, and the paths that were asked for."""
    folder, asked = tmp_path / "offered", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_request(self, *_):
            asked.append(self.path)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


def test_weights_by_url_are_downloaded_once(teacher, server):
    folder, address, asked = server
    torch.save(teacher.state_dict(), folder / "published.pth")
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(read_checkpoint, [f"{address}/published.pth"] * 4))
    assert asked == ["/published.pth"]
    torch.testing.assert_close(read[0], teacher.state_dict(), rtol=0, atol=0)


def test_what_torch_hub_has_downloaded_is_used(teacher, server, tmp_path):
    _, address, asked = server
    cached = tmp_path / "hub/checkpoints/published.pth"
    cached.parent.mkdir(parents=True)
    torch.save(teacher.state_dict(), cached)
    assert local_weights(f"{address}/any/published.pth") == cached
    assert asked == []


def test_a_url_that_cannot_be_read(server, tmp_path):
    _, address, _ = server
    with pytest.raises(ValueError, match=r"none.pth' cannot be read"):
        read_checkpoint(f"{address}/none.pth")
    assert not list((tmp_path / "hub").rglob("*.pth"))


def test_looking_for_weights_downloads_none(teacher, server, tmp_path):
    folder, url, asked = server
    torch.save(teacher.state_dict(), folder / "weights.pth")
    check_found(f"{url}/weights.pth")
    check_found((folder / "weights.pth").as_uri())
    assert asked == ["/weights.pth"] and not list(tmp_path.rglob("hub/**/*.pth"))
    for name in (
        f"{url}/none.pth",
        (folder / "none.pth").as_uri(),
        "http://127.0.0.1:9/a.pth",
        str(folder / "none.pth"),
    ):
        with pytest.raises(FileNotFoundError):
            check_found(name)


@pytest.mark.parametrize("read", [read_checkpoint, load_teacher, check_found])
def test_an_address_that_is_not_read(read):
    with pytest.raises(ValueError, match="s3://bucket"):
        read("s3://bucket/weights.pth")


def test_files_by_url(teacher, tmp_path):
    path = tmp_path / "with space.pth"
    torch.save(teacher.state_dict(), path)
    assert local_weights(path.as_uri()) == path
    torch.testing.assert_close(read_checkpoint(path.as_uri()), teacher.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"file:///no/such.pth' cannot be read"):
        read_checkpoint("file:///no/such.pth")


@pytest.mark.parametrize(
    ("arch", "registers", "name"),
    [
        ("vit_small", 0, "dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("vit_base", 4, "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
        ("vit_large", 0, "dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
        ("vit_giant2", 4, "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
    ],
)
def test_published_addresses(arch, registers, name):
    assert published_url(arch, 14, registers) == f"https://dl.fbaipublicfiles.com/dinov2/{name}"


@pytest.mark.parametrize("what", [("vit_tiny", 14, 4), ("vit_giant2", 16, 4), ("vit_giant2", 14, 2)])
def test_unpublished_architectures(what):
    with pytest.raises(ValueError, match=f"no published DINOv2 weights for {what[0]} with patch size {what[1]}"):
        published_url(*what)


@pytest.mark.parametrize(
    ("arch", "other", "needed"), [("vit_small", "swiglufused", "mlp"), ("vit_giant2", "mlp", "swiglufused")]
)
def test_published_feed_forward_layers(arch, other, needed):
    assert published_url(arch, 14, 4, needed) == published_url(arch, 14, 4)
    with pytest.raises(
        ValueError, match=f"published {arch} weights do not fit ffn_layer = '{other}'; they need '{needed}'"
    ):
        published_url(arch, 14, 4, other)
