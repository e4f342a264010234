"""What notebooks, configurations and scripts of others rely on, frozen: it outlives every move inside the package.

Expected values are written out here and in the YAML files beside, and nothing here names a module that is not public.
Options and keys may be added and get further names; none may vanish. Files that commands leave: `test_files.py`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.commands import ROOT, run

HERE = Path(__file__).parent
TINY_RUN = HERE / "tiny_run.yaml"
INTERFACE, COMMANDS, KEYS = (
    yaml.safe_load((HERE / f"{name}.yaml").read_text()) for name in ("interface", "commands", "keys")
)
LAUNCHERS = {
    "run_1node.sh": ("vitg14_reg4.yaml", "output_vitg14", 8),
    "run_master_node.sh": ("vitg14_reg4.yaml", "output_vitg14", 8),
    "run_other_nodes.sh": ("vitg14_reg4.yaml", "output_vitg14", 8),
    "run_short_1gpu.sh": ("vitg14_reg4_short1.yaml", "output_vitg14_short1", 1),
    "run_1node.sbatch": ("vitg14_reg4.yaml", "output_vitg14", 8),
}
VARIABLES = {
    "run_demo.sh": ["OUTPUT_DIR"],
    "run_tests.sh": ["PATHFM_SLIDES_DIR"],
    "install.sh": ["PYTHON", "PATHFM_EXTRAS", "PATHFM_UNCONSTRAINED", "UV_TORCH_BACKEND"],
    "scripts/install_hest.sh": ["HEST_VENV", "PYTHON", "HEST_UNCONSTRAINED"],
    "scripts/run_eva.sh": ["DATA_ROOT", "DOWNLOAD_DATA", "KEEP_EMBEDDINGS", "PATHFM_EVA_PYTHON"],
}
EVA_TASKS = ["bach", "bracs", "breakhis", "cam16_small", "consep", "crc", "gleason", "mhist", "monusac", "panda_small",
    "pcam", "pcam_10"]  # fmt: skip
RECIPES = [
    "demo",
    "vitg14_reg4",
    "vitg14_reg4_literal",
    "vitg14_reg4_short1",
    "vitg14_reg4_short2",
    "vits14_reg4",
]
PRECISION = "compute_precision.{}.{}.mixed_precision.{}"
META_DIFFERS = (  # from our defaults
    *(PRECISION.format(n, m, "param_dtype=fp16") for n in ("teacher", "student")
      for m in ("backbone", "dino_head", "ibot_head")),
    *(PRECISION.format("teacher", m, "reduce_dtype=fp16") for m in ("backbone", "dino_head", "ibot_head")),
    PRECISION.format("student", "backbone", "reduce_dtype=fp16"),
    "train.dataset_path=ImageNet:split=TRAIN", "student.patch_size=16", "student.interpolate_antialias=false",
    "student.interpolate_offset=0.1", "crops.local_crops_size=96",
    "augmentation.hed_prob=0", "augmentation.brightness=0.4", "augmentation.contrast=0.4",  # in its code
    "augmentation.saturation=0.2", "augmentation.hue=0.1", "augmentation.steps={solarize: {}}",
)  # fmt: skip
OPENMIDNIGHT_DIFFERS = (  # from our vitg14_reg4.yaml
    "data.kind=parquet",
    "dino.do_koleo=false", "dino.do_kde=true", "train.sample_list_path=/data/TCGA/list.txt", "train.num_workers=4",
    "train.prefetch_factor=8", "train.skip_checkpointer=null", "student.block_chunks=4", "optim.base_lr=1e-3",
    "crops.local_crops_number=6", "crops.local_crops_scale=[0.1,0.32]", "evaluation.eval_period_iterations=625",
    "evaluation.bach_root=/data/bach", "evaluation.breakhis_root=/data/breakhis", "evaluation.pcam_root=/data/pcam",
)  # fmt: skip


def public(name: str) -> Any:
    """What a dotted name stands for; a package's own name goes before a module of that name."""
    first, *parts = name.split(".")
    found, place = importlib.import_module(first), first
    for part in parts:
        place = f"{place}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(place)
    return found


@functools.cache
def parser_of(command: str) -> tuple[argparse.ArgumentParser, int]:
    """The parser that a command asks first, and the exit status of ``--help``."""
    seen, parse = [], argparse.ArgumentParser.parse_known_args

    def watched(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return parse(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", watched)
        status = run(command, "--help")
    return seen[0], status


def values(command: str, line: str) -> dict[str, Any]:
    """What a parser makes of a line; options that it does not know are refused."""
    known, unknown = parser_of(command)[0].parse_known_args(shlex.split(line))
    assert not unknown, f"{command} has no {unknown}"
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(known).items()}


# Names


@pytest.mark.parametrize("name", INTERFACE["signatures"])
def test_signatures(name: str):
    expected = ast.parse(f"def f({INTERFACE['signatures'][name]}): ...").body[0].args
    found = inspect.signature(public(name)).parameters
    names = [argument.arg for argument in expected.args]
    assert list(found)[: len(names)] == names
    assert {argument.arg for argument in expected.kwonlyargs} <= found.keys()
    positional = zip(names[len(names) - len(expected.defaults) :], expected.defaults, strict=True)
    keywords = zip((argument.arg for argument in expected.kwonlyargs), expected.kw_defaults, strict=True)
    defaults = dict([*positional, *keywords])
    for parameter, default in defaults.items():
        have = found[parameter].default
        if isinstance(default, ast.Name):
            assert have.__name__ == default.id, parameter
        else:
            assert have == ast.literal_eval(default), parameter
    kinds = {parameter.kind for parameter in found.values()}
    assert expected.kwarg is None or inspect.Parameter.VAR_KEYWORD in kinds
    assert expected.vararg is None or inspect.Parameter.VAR_POSITIONAL in kinds
    ours = [parameter for key, parameter in found.items() if key not in names and key not in defaults]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not p.empty or p.kind in variadic for p in ours), "an argument of ours is needed"


@pytest.mark.parametrize("name", INTERFACE["names"])
def test_names(name: str):
    assert callable(public(name))


@pytest.mark.parametrize("name", INTERFACE["architectures"])
def test_architectures(name: str):
    width, depth, heads = INTERFACE["architectures"][name]
    with torch.device("meta"):
        model = public(f"dinov2.models.vision_transformer.{name}")(patch_size=14)
    assert (model.embed_dim, model.num_features, model.n_blocks, model.num_heads) == (
        width,
        width,
        depth,
        heads,
    )
    assert (model.patch_size, model.num_register_tokens, len(model.blocks)) == (14, 0, depth)


# State dicts


def expand(spec: dict[str, Any], prefix: str = "") -> dict[str, list[int]]:
    """Shapes by key, every block's written out."""
    blocks = {
        f"{prefix}blocks.{number}.{key}": shape
        for number in range(spec["depth"])
        for key, shape in spec["block"].items()
    }
    return spec["tensors"] | blocks


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


def vit_small(**others: Any) -> torch.nn.Module:
    make = public("dinov2.models.vision_transformer.vit_small")
    return make(**{"patch_size": 14, "img_size": 518, "block_chunks": 0, **others})


def test_state_dict_of_backbones():
    registers = {"init_values": 1.0, "num_register_tokens": 4}
    gated = {"ffn_layer": "swiglufused", "qkv_bias": False, "proj_bias": False}
    for name, arguments in (("vit_small", registers), ("swiglu", gated)):
        model = vit_small(**arguments)
        assert shapes(model.state_dict()) == expand(INTERFACE["state_dicts"][name])
        chunked = {
            re.sub(r"^blocks\.(\d+)\.", lambda found: f"blocks.{int(found[1]) // 3}.{found[1]}.", key): value
            for key, value in model.state_dict().items()
        }
        assert "blocks.1.3.norm1.weight" in chunked
        model.load_state_dict(chunked)


def test_outputs_of_a_backbone():
    model, images = vit_small(img_size=56, num_register_tokens=4).eval(), torch.rand(2, 3, 56, 28)
    out = model.forward_features(images, torch.zeros(2, 8, dtype=torch.bool))
    assert shapes({key: value for key, value in out.items() if key != "masks"}) == {
        "x_norm_clstoken": [2, 384], "x_norm_regtokens": [2, 4, 384], "x_norm_patchtokens": [2, 8, 384],
        "x_prenorm": [2, 13, 384],
    }  # fmt: skip
    assert "masks" in out
    assert torch.equal(model(images), model(images, is_training=True)["x_norm_clstoken"])
    ((maps, tokens),) = model.get_intermediate_layers(images, n=1, reshape=True, return_class_token=True)
    assert (maps.shape, tokens.shape) == ((2, 384, 4, 2), (2, 384))
    assert model.interpolate_pos_encoding(out["x_prenorm"], 56, 28).shape == (1, 9, 384)


def test_metas_training_step():
    """From images to losses and gradients by Meta's names alone."""
    arch = public("dinov2.train.ssl_meta_arch.SSLMetaArch")(yaml.safe_load(TINY_RUN.read_text()))
    expected = expand(INTERFACE["state_dicts"]["tiny_run"], "backbone.")
    state = shapes(arch.state_dict())
    for network in ("student", "teacher"):
        found = {key.removeprefix(f"{network}."): shape for key, shape in state.items() if key.startswith(network)}
        assert found == expected
    assert (state["dino_loss.center"], state["ibot_patch_loss.center"]) == ([1, 64], [1, 1, 48])
    augment = public("dinov2.data.DataAugmentationDINO")((0.32, 1.0), (0.05, 0.32), 2, 56, 28)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    samples = [(augment(Image.fromarray(pixels)), None) for _ in range(4)]
    masks = public("dinov2.data.MaskingGenerator")((4, 4), max_num_patches=8)
    collate = public("dinov2.data.collate_data_and_cast")
    batch = collate(samples, (0.1, 0.5), 0.5, torch.float32, n_tokens=16, mask_generator=masks)
    assert shapes({key: batch[key] for key in batch if key.startswith("collated")}) == {
        "collated_global_crops": [8, 3, 56, 56], "collated_local_crops": [8, 3, 28, 28], "collated_masks": [8, 16],
    }  # fmt: skip
    rest = ("mask_indices_list", "masks_weight", "upperbound", "n_masked_patches")
    assert all(key in batch for key in rest)
    losses = arch.forward_backward(batch, teacher_temp=0.04)
    assert {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss"} <= losses.keys()
    assert arch.student.backbone.cls_token.grad.abs().sum() > 0
    before = arch.teacher.backbone.cls_token.clone()
    arch.update_teacher(0.5)
    assert torch.allclose(arch.teacher.backbone.cls_token, before / 2 + arch.student.backbone.cls_token / 2)


def test_cosine_schedule():
    schedule = public("dinov2.utils.utils.CosineScheduler")(1.0, 0.0, 12, warmup_iters=3, freeze_iters=1)
    assert [schedule[step] for step in (0, 1, 2, 3, 4, 8, 11, 12)] == pytest.approx(
        [0, 0, 0.5, 1, 1, 0.5, 0.0380602, 0], abs=1e-6
    )


# Configuration


@functools.cache
def load(*overrides: str, file: Path | None = None) -> Any:
    return public("dinov2.configs.load_config")(file, overrides)


def override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def test_defaults():
    """Writing the defaults out changes nothing, except that the older switches name the kind of the data."""
    written = [override(key, accepted[0]) for key, accepted in KEYS["keys"].items()]
    expected = load("data.kind=parquet")
    changed = [] if load(*written) == expected else [item for item in written if load(item) not in (load(), expected)]
    assert load(*written) == expected, f"no longer the default: {changed}"


@pytest.mark.parametrize("key", KEYS["keys"])
def test_keys(key: str):
    for value in KEYS["keys"][key][1:]:
        switch = [KEYS["with_switch"][key]] if key in KEYS["with_switch"] else []
        config = load(*switch, override(key, value))
        assert key in KEYS["accepted_only"] or config != load(*switch), f"{key} = {value} is without effect"


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_files_load(name: str):
    assert load(file=ROOT / f"dinov2/configs/train/{name}.yaml") != load()


def test_published_files_load():
    assert load(file=HERE / "meta_style.yaml") == load(*META_DIFFERS)
    ours = ROOT / "dinov2/configs/train/vitg14_reg4.yaml"
    assert load(file=HERE / "openmidnight_style.yaml") == load(*OPENMIDNIGHT_DIFFERS, file=ours)


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command: str):
    spec = COMMANDS[command]
    assert parser_of(command)[1] == 0
    for line in spec["accepted"]:
        values(command, line)
    plain = values(command, spec["required"])
    given = values(command, f"{spec['required']} {spec.get('defaults', '')}")
    assert given == plain


@pytest.mark.parametrize("command", COMMANDS)
def test_refusals_exit_with_2(command: str, tmp_path: Path):
    for line in [*COMMANDS[command].get("refused", []), f"{COMMANDS[command]['required']} --no-such-option"]:
        assert run(command, line.replace("TMP", str(tmp_path))) == 2, line
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert left <= {"config.yaml", "rank_0.log", ".lock"}, f"{line} has left something"


@pytest.mark.parametrize(
    "command",
    [
        "-m dinov2.data.inspect",
        "-m dinov2.data.repack",
        f"{ROOT}/prepatching_scripts/create_sample_dataset_txt.py",
    ],
)
def test_commands_start_in_a_fresh_process(command: str, tmp_path: Path):
    """From another folder; `test_files.py` starts the training so."""
    line = [sys.executable, *command.split(), "--help"]
    assert subprocess.run(line, cwd=tmp_path, capture_output=True).returncode == 0


def test_eva_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CHECKPOINT_PATH", "MODEL_NAME", "MODEL_EXTRA_KWARGS"):
        monkeypatch.delenv(name, raising=False)
    assert run("dinov2.eval.eva_cli", "check") == 2
    assert run("dinov2.eval.eva_cli", f"predict_fit --config {tmp_path}/absent.yaml") == 2
    assert {path.stem for path in (ROOT / "eval_configs").glob("*.yaml")} >= set(EVA_TASKS)


def test_run_eva_exits_with_2(tmp_path: Path):
    script, teacher = ROOT / "scripts/run_eva.sh", tmp_path / "teacher.pth"
    teacher.touch()
    environment = {"PATH": os.environ["PATH"], "DATA_ROOT": str(tmp_path)}
    for arguments in ([], ["/absent.pth", "out"], [teacher, "out", "no_such_task"], [teacher, tmp_path]):
        refused = subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True)
        assert refused.returncode == 2, arguments
    assert os.listdir(tmp_path) == ["teacher.pth"]


@pytest.mark.parametrize("script", VARIABLES)
def test_variables_of_scripts(script: str):
    assert os.access(ROOT / script, os.X_OK)
    text = (ROOT / script).read_text()
    assert all(re.search(rf"\$\{{?{name}\b", text) for name in VARIABLES[script])


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launchers(script: str, tmp_path: Path):
    """What ``DRY_LAUNCH=1`` prints, in a copy, for it asks for an installed environment beside the script."""
    config, output, processes = LAUNCHERS[script]
    for name in (script, "run_1node.sh", "scripts/_launch.sh", "scripts/_requeue.sh", f"dinov2/configs/train/{config}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    gpus = ",".join(map(str, range(processes)))
    environment = {
        "PATH": os.environ["PATH"], "DRY_LAUNCH": "1", "CUDA_VISIBLE_DEVICES": gpus, "SLURM_SUBMIT_DIR": str(tmp_path),
        "MASTER_ADDR": "10.0.0.1",
    }  # fmt: skip
    for variables, resume in (
        ({}, []),
        ({"RESUME": "False", "OUTPUT_DIR": "out", "CONFIG_FILE": str(TINY_RUN)}, None),
    ):
        result = subprocess.run(
            [tmp_path / script, "train.seed=1"],
            env=environment | variables,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        words = shlex.split(result.stdout)
        start = words.index(str(tmp_path / "dinov2/train/train.py"))
        assert words[0] == str(python)
        assert ("--nproc_per_node" in words) == (processes > 1)
        file = variables.get("CONFIG_FILE", str(tmp_path / "dinov2/configs/train" / config))
        folder = variables.get("OUTPUT_DIR", str(tmp_path / output))
        flags = ["--no-resume"] if resume is None else resume
        assert words[start + 1 :] == ["--config-file", file, "--output-dir", folder, *flags, "train.seed=1"]
