"""Tiny training runs: a dataset of real tissue and a configuration that trains in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from skimage.data import immunohistochemistry
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

TINY = (
    "student.arch=vit_demo",
    "student.num_register_tokens=2",
    "student.layerscale=1.0",
    "student.drop_path_rate=0.2",
    "dino.head_n_prototypes=64",
    "dino.head_hidden_dim=64",
    "dino.head_bottleneck_dim=32",
    "dino.koleo_loss_weight=0.1",
    "dino.kde_loss_weight=0.05",
    "ibot.head_n_prototypes=48",
    "ibot.head_hidden_dim=64",
    "ibot.head_bottleneck_dim=32",
    "ibot.separate_head=true",
    "train.batch_size_per_gpu=8",
    "train.centering=sinkhorn_knopp",
    "train.OFFICIAL_EPOCH_LENGTH=4",
    "train.num_workers=0",
    "train.stream_block_rows=4",
    "train.checkpoint_period_iterations=3",
    "crops.global_crops_size=56",
    "crops.local_crops_size=28",
    "crops.local_crops_number=2",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "optim.base_lr=0.01",
    "optim.freeze_last_layer_epochs=0",
    "teacher.warmup_teacher_temp_epochs=1",
    "evaluation.eval_period_iterations=100",
    "logging.period_iterations=1",
    "logging.wandb=false",
    *(
        f"compute_precision.{network}.{module}.mixed_precision.param_dtype=fp32"
        for network in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
    ),
)

NARROW_DINOV3 = (
    "student.arch=dinov3_vit",
    "student.ffn_layer=swiglu",
    "student.options.embed_dim=64",
    "student.options.depth=2",
    "student.options.num_heads=2",
    "student.options.norm_layer=layernormbf16",
    "student.options.n_storage_tokens=4",
    "student.options.mask_k_bias=true",
    "student.options.pos_embed_rope_rescale_coords=2.0",
    "student.options.untie_global_and_local_cls_norm=true",
)
"""Over `TINY`: DINOv3's 7B in all but its sizes and the bias of queries and values."""


def write_tissue_shards(folder: Path, shards: int = 3, rows: int = 30, size: int = 64) -> Path:
    """Parquet shards of distinct JPEG crops of scikit-image's micrograph, nanopath's two columns."""
    folder.mkdir(parents=True)
    tissue = immunohistochemistry()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        corners = rng.integers(0, tissue.shape[0] - size, (rows, 2))
        tiles = []
        for y, x in corners:
            buffer = io.BytesIO()
            Image.fromarray(tissue[y : y + size, x : x + size]).save(buffer, "JPEG", quality=95)
            tiles.append(buffer.getvalue())
        paths = [f"slide_{shard}/{x}_{y}_0.jpg" for y, x in corners]
        table = pa.table({"path": paths, "jpeg": pa.array(tiles, pa.binary())})
        pq.write_table(table, folder / f"shard-{shard:05d}.parquet", row_group_size=8, use_dictionary=False)
    return folder


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint_tensors(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, read with torch's own converter."""
    file = output_dir / f"flat_{step}.pt"
    dcp_to_torch_save(output_dir / "checkpoints" / f"step_{step:07d}", file)
    flat: dict[str, torch.Tensor] = {}

    def visit(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(f"{prefix}/{key}", value)
        else:
            flat[prefix] = node

    visit("", torch.load(file, weights_only=True))
    return flat
