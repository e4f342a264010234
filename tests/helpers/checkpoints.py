"""Checkpoints on the disk, as tests alter them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash

from dinov2.models.vision_transformer import DinoVisionTransformer

CHECKSUMS = "checksums.xxh128"


def seal(folder: Path) -> None:
    """Write the checksums that fit the files of a checkpoint as they are."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKSUMS}
    lines = [f"{xxhash.xxh3_128_hexdigest(content)}  {name}\n" for name, content in sorted(contents.items())]
    (folder / CHECKSUMS).write_text("".join(lines))


def unseal(folder: Path) -> None:
    """Make a checkpoint one of the format before there were checksums."""
    (folder / CHECKSUMS).unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["checksums"]
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def forget(teacher: Path) -> None:
    """Make an export one of the format before there were checksums, so that either file may be altered."""
    beside = teacher.with_suffix(".json")
    record = json.loads(beside.read_text())
    del record["checksums"]
    beside.write_text(json.dumps(record))


def save_vit(path: Path, seed: int = 3, **sizes: int) -> Path:
    """Save a random ViT as Meta publishes its own, of patches of 8 px, width 192 and 3 blocks where not told else."""
    torch.manual_seed(seed)
    sizes = {"patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3, "img_size": 48, **sizes}
    torch.save(DinoVisionTransformer(init_values=1.0, **sizes).state_dict(), path)
    return path
