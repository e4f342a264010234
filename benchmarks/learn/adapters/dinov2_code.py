"""One run of Meta's training code, or of a descendant that kept its names, on a CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cpu
import torch
from common import Exports
from omegaconf import OmegaConf

_SCALED = ("optim.warmup_epochs", "optim.freeze_last_layer_epochs", "teacher.warmup_teacher_temp_epochs")


def import_training(root: Path) -> Any:
    """The peer's ``dinov2.train.train``, ready for one process on a CPU."""
    cpu.stay_on_cpu()
    cpu.provide_xformers()
    sys.path.insert(0, str(root))
    distributed = importlib.import_module("dinov2.distributed")
    distributed.enable = lambda **_: None
    fsdp = importlib.import_module("dinov2.fsdp")
    fsdp.get_fsdp_wrapper, fsdp.get_fsdp_modules = cpu.unsharded, cpu.parameter_groups
    fsdp.reshard_fsdp_model = lambda _: None
    train = importlib.import_module("dinov2.train.train")
    # Sinkhorn-Knopp of the patches sums over processes without asking whether there are others.
    alone = SimpleNamespace(is_initialized=lambda: False, all_reduce=lambda *_, **__: None)
    importlib.import_module("dinov2.loss.ibot_patch_loss").dist = alone
    train.FSDPCheckpointer = train.PeriodicCheckpointer = cpu.NoCheckpoints
    collate = train.collate_data_and_cast
    # Crops come in half precision, for weights that FSDP would have cast.
    train.collate_data_and_cast = lambda *args, dtype, **kwargs: collate(*args, dtype=torch.float32, **kwargs)
    return train


def add_network(network: Mapping[str, Any]) -> None:
    """Register ``vit_ours``: our widths, in the peer's own class and with its own initialisation."""
    vits = importlib.import_module("dinov2.models.vision_transformer")
    attention = importlib.import_module("dinov2.layers").MemEffAttention
    block = partial(importlib.import_module("dinov2.layers").NestedTensorBlock, attn_class=attention)
    sizes = {name: network[name] for name in ("embed_dim", "depth", "num_heads")}
    vits.vit_ours = partial(vits.DinoVisionTransformer, mlp_ratio=4, block_fn=block, **sizes)


def settings(spec: Mapping[str, Any], recipe: Any) -> Any:
    """The peer's recipe with our network, batch, crops and heads, its epochs (one step each) stretched over the run.

    Args:
        spec: of the run.
        recipe: defaults and recipe of the peer, merged.
    """
    network, head = spec["network"], spec["head"]
    heads = {name: head[name] for name in ("head_n_prototypes", "head_hidden_dim", "head_bottleneck_dim")}
    ours = {
        "dino": heads,
        "ibot": heads,
        "compute_precision": {"grad_scaler": False},
        "train": {
            "batch_size_per_gpu": spec["batch_size"],
            "num_workers": spec["num_workers"],
            "OFFICIAL_EPOCH_LENGTH": 1,
            "seed": spec["seed"],
        },
        "student": {
            "arch": "vit_ours",
            "patch_size": network["patch_size"],
            "num_register_tokens": network["registers"],
            "layerscale": network["layerscale"],
            "drop_path_rate": network["drop_path_rate"],
            "ffn_layer": "mlp",
            "block_chunks": 0,
        },
        "optim": {"epochs": spec["steps"]},
        "crops": {name: value for name, value in spec["crops"].items()},
        "evaluation": {"eval_period_iterations": -1},
    }
    scale, config = spec["steps"] / recipe.optim.epochs, OmegaConf.merge(recipe, ours)
    for key in _SCALED:
        OmegaConf.update(config, key, round(scale * OmegaConf.select(recipe, key)))
    return OmegaConf.merge(config, OmegaConf.from_dotlist(spec["overrides"]))


def run(spec: Mapping[str, Any], train: Any, config: Any) -> None:
    """Train, and export the teacher before the first step and after those that are asked for."""
    add_network(spec["network"])
    student = config.student
    resampling = {name: student[name] for name in ("interpolate_antialias", "interpolate_offset")}
    exports, arch = Exports(spec, **resampling), train.SSLMetaArch
    prepare, update, seen = arch.prepare_for_distributed_training, arch.update_teacher, 0
    # In place of FSDP's casts of weights and inputs.
    arch.forward_backward = torch.autocast("cpu", torch.bfloat16, enabled=spec["bf16"])(arch.forward_backward)

    def prepare_and_save(model: Any) -> None:
        prepare(model)
        exports.save(0, model.teacher.backbone.state_dict())

    def update_and_save(model: Any, momentum: float) -> None:
        nonlocal seen
        update(model, momentum)
        seen += spec["batch_size"]
        exports.save(seen, model.teacher.backbone.state_dict())

    arch.prepare_for_distributed_training, arch.update_teacher = prepare_and_save, update_and_save
    arch.to = lambda model, *args: model
    arch.fsdp_synchronize_streams = lambda model: None
    file = spec["output"] / "settings.yaml"
    OmegaConf.save(config, file)
    arguments = ["--config-file", str(file), "--output-dir", str(spec["output"]), "--no-resume"]
    args = train.get_args_parser().parse_args(arguments)
    args.seed = spec["seed"]
    train.main(args)
