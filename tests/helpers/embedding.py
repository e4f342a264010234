"""Running `python -m dinov2.eval.embed`, and what it must give, from images embedded one by one."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from dinov2.eval.embed.__main__ import main
from dinov2.export import save_teacher
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_teacher(folder):
    """A small exported teacher that was trained with colours of its own: its file and its backbone."""
    torch.manual_seed(3)
    backbone = randomise(DinoVisionTransformer(**SMALL, num_register_tokens=2)).eval()
    path = Path(folder) / "teacher.pth"
    config = {"augmentation": {"normalize_mean": MEAN, "normalize_std": STD}}
    about = {"architecture": {**SMALL, "num_register_tokens": 2}, "step": 7, "config": config}
    save_teacher(path, {"backbone": backbone.state_dict()}, about)
    return path, backbone


def embed(teacher, source, output, *options):
    """Run the command on the CPU, which must succeed."""
    common = [
        "--checkpoint",
        teacher[0],
        "--input",
        source,
        "--output",
        output,
        "--device",
        "cpu",
        "--workers",
        "2",
    ]
    assert main([str(word) for word in (*common, *options)]) == 0
    return output


@torch.no_grad()
def expected(teacher, images, mean=MEAN, std=STD, with_mean=False):
    """Embeddings of uint8 images, one by one."""
    rows = []
    for image in images:
        x = torch.from_numpy((np.asarray(image, np.float64) / 255 - mean) / std).float().permute(2, 0, 1)[None]
        tokens = teacher[1].forward_features(x)
        parts = [tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)]
        rows.append(torch.cat(parts[: 1 + with_mean], 1)[0].numpy())
    return np.stack(rows)


def rows_of(folder):
    """The output's table and its embeddings."""
    table = pq.read_table(folder)
    return table, np.stack(table["embedding"].to_pylist())


def contents(folder):
    """All files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def refused(teacher, capsys, source, output, *options):
    """What the command says when it refuses; always one line."""
    capsys.readouterr()
    words = ["--checkpoint", teacher[0], "--input", source, "--output", output, "--device", "cpu", *options]
    assert main([str(word) for word in words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if " E " in line]
    assert len(said) == 1
    return said[0]
