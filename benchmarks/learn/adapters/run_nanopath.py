"""Train with nanopath (ROOT/nanopath), its main recipe, from scratch.

Ours are network, batch, crops and the size of the heads; overrides are keys of its configuration. Its learning rate is
one for starting from published weights: raise ``dino.lr`` to be fair to it. Its schedules follow FLOPs and end at 19 %
of them, as its main run does. The code is as it was cloned: names of its modules are replaced from outside.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from common import Exports, nested, read_spec, tiles
from omegaconf import OmegaConf
from torch import nn

_FLOPS_REACHED = 0.19


class CpuTorch:
    """The module `torch` but for the device."""

    cuda = SimpleNamespace(
        get_rng_state=lambda device: None,
        set_rng_state=lambda state, device: None,
        memory_allocated=lambda device: 0,
        max_memory_allocated=lambda device: 0,
        reset_peak_memory_stats=lambda device: None,
    )

    @staticmethod
    def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
        """That of the CPU."""
        return torch.autocast("cpu", dtype)

    @staticmethod
    def device(_: str) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def initialise(model: nn.Module, layerscale: float, patch_size: int) -> None:
    """Meta's starting weights, for a class that only ever loads published ones, of patches of 14 px."""
    model.patch_embed.proj = nn.Conv2d(3, model.embed_dim, patch_size, patch_size)
    model.patch_size = patch_size
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        nn.init.constant_(block.ls1.gamma, layerscale)
        nn.init.constant_(block.ls2.gamma, layerscale)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.normal_(model.cls_token, std=1e-6)
    nn.init.normal_(model.register_tokens, std=1e-6)


def settings(spec: dict[str, Any], recipe: dict[str, Any], shards: Path) -> dict[str, Any]:
    """The recipe with our network, batch, crops and heads."""
    crops, head = spec["crops"], spec["head"]
    output = str(spec["output"] / "nanopath")
    recipe["project"] |= {"output_dir": output, "wandb_dir": str(spec["output"] / "wandb")}
    recipe["data"] |= {
        "dataset_dir": str(shards),
        "val_fraction": 0.0,
        "global_crop_scale": crops["global_crops_scale"],
        "local_crop_scale": crops["local_crops_scale"],
    }
    recipe["model"] = {"type": "ours"}
    recipe["train"] |= {
        "seed": spec["seed"],
        "bf16": spec["bf16"],
        "batch_size": spec["batch_size"],
        "num_workers": spec["num_workers"],
        "save_every": None,
        "eval_every": spec["steps"],
        "val_batches": 0,
        "local_views": crops["local_crops_number"],
        "global_size": crops["global_crops_size"],
        "local_size": crops["local_crops_size"],
        "max_train_samples": spec["steps"] * spec["batch_size"],
    }
    recipe["dino"] |= {
        "head_hidden_dim": head["head_hidden_dim"],
        "head_bottleneck_dim": head["head_bottleneck_dim"],
        "drop_path_rate": spec["network"]["drop_path_rate"],
    }
    recipe["probe"]["enabled"] = False
    return OmegaConf.to_container(OmegaConf.merge(recipe, nested(spec["overrides"])))


def main() -> None:
    """Train as the specification says."""
    spec = read_spec()
    network, root = spec["network"], Path(spec["root"]) / "nanopath"
    shards = spec["output"] / "tiles"
    shards.mkdir()
    stored = tiles(spec)
    paths = [f"{group}/{number}_0_0.jpg" for number, (group, _) in enumerate(stored)]
    table = pa.table({"path": paths, "jpeg": pa.array([data for _, data in stored], pa.binary())})
    pq.write_table(table, shards / "shard-00000.parquet", row_group_size=64)

    sys.path.insert(0, str(root))
    import dataloader
    import model
    import train

    sizes = (network["embed_dim"], network["depth"], network["num_heads"])
    grid = spec["crops"]["global_crops_size"] // network["patch_size"]
    model.DINOV2_VARIANTS["ours"] = (*sizes, grid, "mlp", True, "", network["registers"])
    exports = Exports(spec, interpolate_antialias=True, interpolate_offset=0.0)
    update, seen, measuring = train.update_ema, 0, True

    def start(backbone: nn.Module) -> nn.Module:
        initialise(backbone, network["layerscale"], network["patch_size"])
        exports.save(0, backbone.state_dict())
        return backbone

    def update_and_save(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
        nonlocal seen
        update(student, teacher, momentum)
        if isinstance(teacher, model.DinoV2ViT) and not measuring:
            seen += spec["batch_size"]
            exports.save(seen, teacher.state_dict())

    train.torch, train.load_dinov2_pretrained, train.update_ema = CpuTorch(), start, update_and_save
    prototypes = spec["head"]["head_n_prototypes"]
    train.DINOHead = lambda width, _, *sizes: model.DINOHead(width, prototypes, *sizes)
    # Without a validation part, the tiles to validate on (none, see val_batches) are those of training.
    train.TCGATileDataset = lambda config, is_train: dataloader.TCGATileDataset(config, is_train=True)
    config = settings(spec, yaml.safe_load((root / "configs" / "main.yaml").read_text()), shards)
    file = spec["output"] / "settings.yaml"
    sys.argv = ["train.py", str(file)]

    def run(**limits: int) -> dict[str, Any]:
        file.write_text(yaml.safe_dump(config | {"train": config["train"] | limits}))
        random.seed(spec["seed"])
        train.main()
        return json.loads((spec["output"] / "nanopath" / "summary.json").read_text())

    step = run(max_train_samples=spec["batch_size"], max_train_flops=10**18)["train_flops"]
    measuring = False
    run(max_train_flops=round(step * spec["steps"] / _FLOPS_REACHED))


if __name__ == "__main__":
    main()
