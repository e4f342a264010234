"""Teachers open from every layout, with the architecture stated or inferred."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import nn

from dinov2.configs import load_config
from dinov2.export import main as export_command
from dinov2.export import save_teacher
from dinov2.extensions import BACKBONES
from dinov2.hub import layouts_dinov3, load_teacher, pretrained
from dinov2.hub.layouts import HEADS
from dinov2.layers import DINOHead
from dinov2.models import build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_demo, vit_small
from tests.helpers.backbones import chunked, randomise, transformers_weights
from tests.helpers.checkpoints import forget
from tests.helpers.runs import TINY

ROOT = Path(__file__).parents[3]


def export(folder: Path, *overrides: str) -> tuple[Path, nn.Module]:
    """A file as training writes it, and the backbone in it."""
    config = load_config(None, [*TINY, "train.streaming_dataset_path=unused", *overrides])
    teacher, width = build_model_from_cfg(config, only_teacher=True)
    randomise(teacher).eval()
    modules = {"backbone": teacher, "dino_head": DINOHead(width, 16, hidden_dim=8, bottleneck_dim=4)}
    path = folder / "eval" / "training_7" / "teacher_checkpoint.pth"
    metadata = {"architecture": teacher.describe(), "step": 7, "samples": 56, "config": {}}
    save_teacher(path, {name: module.state_dict() for name, module in modules.items()}, metadata)
    return path, teacher


def test_damaged_exports_are_refused_or_what_they_were(tmp_path):
    """100 flipped bits in each file, and cut ones: an error, or the very same teacher."""
    path, teacher = export(tmp_path)
    random, whole = Random(0), {file: file.read_bytes() for file in (path, path.with_suffix(".json"))}
    refused = 0
    for file, content in whole.items():
        damaged = [content[: len(content) // 2], content[:-1]]
        for bit in (random.randrange(8 * len(content)) for _ in range(100)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(flipped))
        for content_now in damaged:
            file.write_bytes(content_now)
            try:
                found = load_teacher(path).state_dict()
            except ValueError:
                refused += 1
            else:  # a bit of the JSON's key, or of the case of an exponent
                assert file.suffix == ".json"
                assert all(torch.equal(found[key], value) for key, value in teacher.state_dict().items())
        file.write_bytes(content)
    assert refused >= 195
    load_teacher(path)


def test_checksums_of_an_export(tmp_path):
    path, _ = export(tmp_path)
    beside = path.with_suffix(".json")
    record = json.loads(beside.read_text())
    assert record["checksums"]["weights"] == xxhash.xxh3_128_hexdigest(path.read_bytes())
    beside.write_text(json.dumps(record | {"step": 8}))
    with pytest.raises(ValueError):
        load_teacher(path)
    del record["checksums"]  # of an earlier version, or edited
    beside.write_text(json.dumps(record | {"step": 8}))
    load_teacher(path)
    for mistyped in (None, 3, {}, {"weights": 1, "record": []}):
        beside.write_text(json.dumps(record | {"checksums": mistyped}))
        with pytest.raises(ValueError):
            load_teacher(path)


def test_weights_to_start_from_are_verified(tmp_path):
    path, _ = export(tmp_path)
    other = torch.load(path, weights_only=True)
    other["teacher"]["backbone.cls_token"] += 1
    torch.save(other, path)
    with pytest.raises(ValueError):
        pretrained.read_checkpoint(str(path))


@pytest.mark.parametrize("json_beside", [True, False], ids=["stated", "inferred"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("student.num_register_tokens=4", "student.interpolate_antialias=true", "student.interpolate_offset=0"),
        ("student.num_register_tokens=0", "student.interpolate_antialias=false", "student.interpolate_offset=0.1"),
        ("student.ffn_layer=swiglufused", "student.qkv_bias=false", "student.ffn_bias=false",
         "student.interpolate_antialias=true", "student.interpolate_offset=0"),
        ("student.ffn_layer=identity", "student.proj_bias=false", "student.layerscale=0",
         "student.interpolate_antialias=true", "student.interpolate_offset=0"),
    ],
    ids=["registers", "none", "swiglu", "identity"],
)  # fmt: skip
def test_exported_teachers(overrides, json_beside, tmp_path):
    path, teacher = export(tmp_path, *overrides)
    if not json_beside:
        path.with_suffix(".json").unlink()
    model = load_teacher(path)
    assert not model.training
    for size in (56, 84):  # the training grid and a resampled one
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=0)


def test_what_only_the_json_knows(tmp_path):
    path, teacher = export(tmp_path, "student.interpolate_antialias=false", "student.interpolate_offset=0.25")
    images = torch.randn(2, 3, 84, 84)
    torch.testing.assert_close(load_teacher(path)(images), teacher(images), rtol=0, atol=0)
    path.with_suffix(".json").unlink()
    assert not torch.allclose(load_teacher(path)(images), teacher(images))


def test_feature_map(tmp_path):
    path, teacher = export(tmp_path)
    images = torch.randn(2, 3, 56, 84)
    maps = load_teacher(path, feature_map=True)(images)
    assert isinstance(maps, list) and len(maps) == 1
    assert maps[0].shape == (2, 128, 4, 6)
    patches = teacher.forward_features(images)["x_prenorm"][:, 3:]
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), patches, rtol=0, atol=0)


@pytest.mark.parametrize(("registers", "antialias", "offset"), [(4, True, 0.0), (0, False, 0.1)])
def test_released_teachers(registers, antialias, offset, tmp_path):
    """OpenMidnight's: chunks, wrappers, no JSON; here in half precision."""
    teacher = vit_small(
        patch_size=14, img_size=224, num_register_tokens=registers, ffn_layer="swiglufused", init_values=1e-5,
        interpolate_antialias=antialias, interpolate_offset=offset,
    )  # fmt: skip
    randomise(teacher).eval()
    state = {key: value.half() for key, value in chunked(teacher.state_dict(), 3).items()}
    wrapped = {"teacher": {f"backbone.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "teacher.pth")
    model = load_teacher(str(tmp_path / "teacher.pth"))
    teacher.load_state_dict(state)
    images = torch.randn(1, 3, 98, 98)
    torch.testing.assert_close(model(images), teacher(images), rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_position_grid_of_the_file_is_kept(tmp_path):
    """Meta's grid of 37 x 37 under a JSON for training at 224 px."""
    published = randomise(vit_demo(patch_size=14, img_size=518, num_register_tokens=4)).eval()
    torch.save(published.state_dict(), tmp_path / "teacher.pth")
    described = {"arch": "vit_demo", "patch_size": 14, "num_register_tokens": 4, "img_size": 224}
    (tmp_path / "teacher.json").write_text(json.dumps({"architecture": described}))
    model = load_teacher(tmp_path / "teacher.pth")
    assert torch.equal(model.pos_embed, published.pos_embed)


def test_heads_are_those_of_the_architectures():
    with torch.device("meta"):
        models = {name: BACKBONES[name]() for name in BACKBONES}
    for heads, names in ((HEADS, "vit_"), (layouts_dinov3.HEADS, "dinov3_vit")):
        found = {model.embed_dim: model.num_heads for name, model in models.items() if name.startswith(names)}
        assert found.items() <= heads.items()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("{", r"teacher.json' does not describe a teacher's architecture"),
        ("[" * 100_000, r"teacher.json' is not JSON"),
        ("[]", r"teacher.json' does not describe a teacher's architecture"),
        (
            '{"step": 7}',
            r"teacher.json' does not describe a teacher's architecture .*architecture.*; mend or remove it",
        ),
        ('{"architecture": {"arch": "vit_vast"}}', "names arch 'vit_vast'; one of vit_demo, vit_shallow, vit_tiny"),
        ('{"architecture": {"arch": "vit_demo", "patch_size": 0}}', "does not describe a backbone"),
        ('{"architecture": {"arch": "vit_demo", "patches": 14}}', "does not describe a backbone .*'patches'"),
        (
            '{"architecture": {"embed_dim": 8, "num_heads": 1, "depth": 10000000}}',
            "does not describe a backbone .*1000",
        ),
        (
            '{"architecture": {"arch": "vit_tiny", "patch_size": 14}}',
            r"do not fit the model: they have width 128, 4 blocks, .* the model width 192, 12 blocks",
        ),
    ],
)
def test_wrong_json(described, message, tmp_path):
    torch.save(vit_demo(patch_size=14, img_size=28).state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "teacher.json").write_text(described)
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(tmp_path / "teacher.pth")
    assert "\n" not in str(error.value)


def test_a_json_that_is_a_link_to_nowhere_is_not_left_out(tmp_path):
    """As where the disk or the cache that it leads to is gone: nothing would be verified."""
    path, _ = export(tmp_path)
    path.with_suffix(".json").unlink()
    path.with_suffix(".json").symlink_to(tmp_path / "away.json")
    with pytest.raises(FileNotFoundError):
        load_teacher(path)


def test_architecture_that_cannot_be_inferred(tmp_path):
    state = vit_demo(patch_size=14, img_size=28).state_dict()
    torch.save({**state, "cls_token": torch.zeros(1, 1, 130)}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"cannot be inferred from its width 130.*put a JSON with its architecture"):
        load_teacher(tmp_path / "teacher.pth")


def test_files_that_hold_no_teacher(tmp_path):
    torch.save({"teacher": {"token.weight": torch.zeros(1, 1, 128)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth' hold no backbone: cls_token, pos_embed, .* a DINOv2 or DINOv3"):
        load_teacher(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_teacher(tmp_path / "none.pth")


@pytest.mark.parametrize("feature_map", [False, True])
def test_both_names_of_the_path(feature_map, tmp_path):
    path, _ = export(tmp_path)
    images = torch.randn(1, 3, 56, 56)
    for model in (
        load_teacher(path, feature_map),
        load_teacher(checkpoint_path=path, feature_map=feature_map),
    ):
        out = model(images)
        assert (out[0] if feature_map else out).shape == ((1, 128, 4, 4) if feature_map else (1, 128))


@torch.no_grad()
def test_class_and_mean(tmp_path):
    path, teacher = export(tmp_path)
    images = torch.randn(2, 3, 56, 84)
    tokens = teacher.norm(teacher.forward_features(images)["x_prenorm"])
    expected = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1)
    torch.testing.assert_close(load_teacher(path, pooling="cls_mean")(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path is None and checkpoint_path None; one of them is expected"),
        ({"path": "a", "checkpoint_path": "b"}, "path is 'a' and checkpoint_path 'b'; one of them"),
        ({"path": "a", "output": "mean"}, "pooling is 'mean'; one of cls, cls_mean is expected"),
        ({"path": "a", "output": "cls_mean", "feature_map": True}, "A feature map has no class token"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(**arguments)


def narrow(folder: Path) -> tuple[Path, nn.Module]:
    """A backbone of transformers' names whose heads are not those of its width, with its ``config.json``."""
    teacher = randomise(vit_demo(patch_size=14, img_size=28, init_values=1.0, interpolate_offset=0.0)).eval()
    for block in teacher.blocks:
        block.attn.num_heads = 8
    save_file(transformers_weights(teacher.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 8, "layer_norm_eps": 1e-6}))
    return folder / "model.safetensors", teacher


@torch.no_grad()
def test_heads_of_the_config_beside(tmp_path):
    path, teacher = narrow(tmp_path)
    images = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(load_teacher(path)(images), teacher(images))
    (tmp_path / "config.json").unlink()
    assert not torch.allclose(load_teacher(path)(images), teacher(images))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config.json' does not describe a model .*; mend or remove it"),
        ("[]", r"config.json' does not describe a model .*; mend or remove it"),
        ('{"layer_norm_eps": "small"}', r"config.json' does not describe a model"),
        ('{"hidden_act": "relu"}', r"has hidden_act = 'relu'"),
        ('{"num_attention_heads": "many"}', "has 'many' attention heads; a positive number is expected"),
        ('{"num_attention_heads": 3}', "cannot be inferred from its width 128, 3 heads and 4 blocks"),
    ],
)
def test_wrong_config_beside(config, message, tmp_path):
    path, _ = narrow(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(path)
    assert "\n" not in str(error.value)


def spoilt(state: dict, kind: str) -> dict:
    """Checkpoints that resemble a DINOv2 backbone."""
    if kind == "no positions":
        return without(state, "pos_embed", "register_tokens")
    if kind == "fork with more":
        return {**state, "blocks.0.adapter.weight": torch.zeros(2)}
    if kind == "tensor missing":
        return without(state, "blocks.2.mlp.fc1.weight")
    if kind == "block missing":
        return without(state, *(key for key in state if key.startswith("blocks.0.")))
    changed = {
        "oblong grid": ("pos_embed", state["pos_embed"][:, :-1]),
        "flat patches": ("patch_embed.proj.weight", state["patch_embed.proj.weight"].flatten(1)),
        "narrow token": ("cls_token", state["cls_token"][0, 0]),
        "narrow map": ("blocks.1.attn.qkv.weight", state["blocks.1.attn.qkv.weight"][:, :64]),
        "empty": ("patch_embed.proj.weight", torch.zeros(0, 3, 0, 0)),
    }
    name, value = changed[kind]
    return {**state, name: value}


def without(state: dict, *keys: str) -> dict:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no positions", "hold no backbone: pos_embed missing; a DINOv2 or DINOv3 ViT is expected"),
        ("fork with more", "do not fit the model: unknown: blocks.0.adapter.weight"),
        ("tensor missing", "do not fit the model: missing: blocks.2.mlp.fc1.weight"),
        ("block missing", "do not fit the model: .*missing: blocks.0.attn"),
        ("oblong grid", r"of another shape: pos_embed \(1, 4, 128\) for \(1, 2, 128\)"),
        ("flat patches", r"patch_embed.proj.weight is \(128, 588\), of other than 4 dimensions"),
        ("narrow token", r"cls_token is \(128,\), of other than 3 dimensions"),
        ("narrow map", r"of another shape: blocks.1.attn.qkv.weight \(384, 64\) for \(384, 128\)"),
        ("empty", r"patch_embed.proj.weight is \(0, 3, 0, 0\), of other than"),
    ],
)
def test_files_of_something_else(kind, message, tmp_path):
    state = vit_demo(patch_size=14, img_size=28, num_register_tokens=4, init_values=1.0).state_dict()
    torch.save({"teacher": spoilt(state, kind)}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(tmp_path / "teacher.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated", "text", "safetensors of text", "empty"])
def test_corrupt_files(kind, tmp_path):
    path = tmp_path / ("teacher.safetensors" if kind == "safetensors of text" else "teacher.pth")
    torch.save(vit_demo(patch_size=14, img_size=28).state_dict(), path)
    path.write_bytes({"truncated": path.read_bytes()[:9000], "empty": b""}.get(kind, b"version https://git-lfs"))
    with pytest.raises(ValueError, match=r"teacher\.\w+' cannot be read \(.*\); a PyTorch .pth or") as error:
        load_teacher(path)
    assert "\n" not in str(error.value)


def test_pickled_code_is_not_run(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"teacher": Surprise()}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher.pth' cannot be read"):
        load_teacher(tmp_path / "teacher.pth")
    assert not (tmp_path / "ran").exists()


def test_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the .pth or .safetensors file in it"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("options", [{}, {"checkpoint_path": True}, {"feature_map": True}, {"output": "cls_mean"}])
@torch.no_grad()
def test_torch_hub(options, tmp_path):
    path, teacher = export(tmp_path)
    images = torch.randn(1, 3, 56, 56)
    where = {"checkpoint_path" if options.pop("checkpoint_path", False) else "path": str(path)}
    model = torch.hub.load(str(ROOT), "pathfm_teacher", source="local", **where, **options)
    out = model(images)
    if "feature_map" in options:
        assert out[0].shape == (1, 128, 4, 4)
    else:
        torch.testing.assert_close(out[:, :128], teacher(images), rtol=0, atol=0)
        assert out.shape == (1, 256 if options else 128)


def test_torch_hub_from_elsewhere_needs_torch_alone(tmp_path):
    path, _ = export(tmp_path)
    program = (
        "import sys, torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'pathfm_teacher', source='local', path={str(path)!r})\n"
        "assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 128)\n"
        "print({'cv2', 'omegaconf', 'pyarrow', 'timm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"


class Rotary(nn.Module):
    """A backbone that is no ViT: no position grid, and a table that no file holds."""

    def __init__(self, patch_size: int = 14, width: int = 32):
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, width
        self.stem = nn.Conv2d(3, width, patch_size, patch_size)
        self.register_buffer("angles", torch.linspace(0, 1, width), persistent=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: torch.Tensor, is_training: bool = False):
        patches = self.stem(x).flatten(2).transpose(1, 2) * self.angles.cos()
        tokens = {"x_norm_clstoken": patches.mean(1), "x_norm_patchtokens": patches}
        return tokens if is_training else tokens["x_norm_clstoken"]


@pytest.fixture
def rotary(monkeypatch):
    """The module under a name that a JSON can state."""
    module = ModuleType("rotary_backbone")
    module.Rotary = Rotary
    monkeypatch.setitem(sys.modules, "rotary_backbone", module)
    monkeypatch.setattr(Rotary, "describe", lambda self: {"arch": "rotary_backbone:Rotary", "width": 16}, raising=False)
    return randomise(Rotary(width=16)).eval()


@torch.no_grad()
def test_a_backbone_that_is_no_vit(rotary, tmp_path):
    path, images = tmp_path / "teacher.pth", torch.randn(2, 3, 56, 28)
    save_teacher(path, {"backbone": rotary.state_dict()}, {"architecture": rotary.describe(), "step": 3})
    torch.testing.assert_close(load_teacher(path)(images), rotary(images), rtol=0, atol=0)
    assert load_teacher(path, pooling="cls_mean")(images).shape == (2, 32)
    command = ["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format"]
    assert export_command([*command, "meta"]) == 0
    torch.testing.assert_close(load_teacher(tmp_path / "out/backbone.pth")(images), rotary(images))
    for rest in (["timm"], ["hf"], ["meta", "--verify"], ["meta", "--image-size", "56"]):
        assert export_command([*command, *rest]) == 2


def test_a_backbone_that_names_itself_is_found_by_the_runs_configuration(rotary, monkeypatch, tmp_path):
    path = tmp_path / "teacher.pth"
    record = {
        "architecture": {"arch": "rotary", "width": 16},
        "config": {"student": {"arch": "rotary_backbone:Rotary"}},
    }
    save_teacher(path, {"backbone": rotary.state_dict()}, record)
    assert isinstance(load_teacher(path), Rotary)
    monkeypatch.setitem(sys.modules, "rotary_backbone", None)  # is not importable any more
    with pytest.raises(ImportError, match="rotary_backbone") as error:
        load_teacher(path)
    assert "\n" not in str(error.value)
    command = ["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--format", "meta"]
    assert export_command(command) == 2


def unannotated(width: int = 16):
    return Rotary(width=width)


def annotated(width: int = 16) -> Rotary:
    return Rotary(width=width)


@pytest.mark.parametrize("arch", ["os:system", "subprocess:run", "builtins:exec", "rotary_backbone:unannotated"])
@pytest.mark.parametrize("where", ["architecture", "config"])
def test_a_json_calls_nothing_but_backbones(rotary, arch, where, tmp_path):
    """It may be from anywhere, as weights may."""
    sys.modules["rotary_backbone"].unannotated = unannotated
    path, made = tmp_path / "teacher.pth", tmp_path / "made"
    arguments = {"command": f"touch {made}"} if arch == "os:system" else {"args": ["touch", str(made)]}
    named = arch if where == "architecture" else "itself"
    record = {"architecture": {"arch": named, **arguments}, "config": {"student": {"arch": arch}}}
    save_teacher(path, {"backbone": rotary.state_dict()}, record)
    with pytest.raises(ValueError, match="no backbone") as error:
        load_teacher(path)
    assert not made.exists() and "\n" not in str(error.value)


def test_a_function_that_says_it_returns_a_backbone(rotary, tmp_path):
    sys.modules["rotary_backbone"].annotated = annotated
    record = {"architecture": {"arch": "rotary_backbone:annotated", "width": 16}}
    save_teacher(tmp_path / "teacher.pth", {"backbone": rotary.state_dict()}, record)
    assert isinstance(load_teacher(tmp_path / "teacher.pth"), Rotary)


class Upside(DinoVisionTransformer):
    """Meta's ViT with one thing changed, under the same names."""

    def tokens(self, images, masks):
        return super().tokens(images.flip(-2), masks)

    def forward_features(self, x, masks=None, patch_index=None):
        return self.tokens(x, masks)


@torch.no_grad()
def test_a_vit_that_is_derived_from_metas_opens_as_itself(tmp_path):
    teacher = randomise(Upside(img_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=4)).eval()
    save_teacher(tmp_path / "t.pth", {"backbone": teacher.state_dict()}, {"architecture": teacher.describe()})
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(load_teacher(tmp_path / "t.pth")(images), teacher(images), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    path, teacher = export(tmp_path)
    teacher.blocks[1].mlp.fc1.weight.data[3, 5] = value
    torch.save({"teacher": teacher.state_dict()}, path)
    forget(path)
    with pytest.raises(ValueError, match=r"teacher_checkpoint.pth.*blocks.1.mlp.fc1.weight"):
        load_teacher(path)


@torch.no_grad()
def test_the_older_name_of_the_pooling(tmp_path):
    path, _ = export(tmp_path)
    assert load_teacher(path, output="cls_mean")(torch.randn(1, 3, 56, 56)).shape == (1, 256)
