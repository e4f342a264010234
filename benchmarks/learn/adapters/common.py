"""What the adapters of all peers share. Adapters run under the peers' own Python and import nothing of ours.

Each is started as ``python run_PEER.py spec.json`` in the run's folder and leaves ``train/<images>.pth`` for each
number of images that the specification asks for, 0 among them, with the JSON beside it that says what network it is.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image


def read_spec() -> dict[str, Any]:
    """The specification that the command names, with ``output`` a folder that is there."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    spec["output"] = Path(spec["output"]).resolve()
    spec["output"].mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    # PyTorch's fused kernel for CPUs is slow for short bf16 sequences; what serves us is to serve all.
    torch.backends.cuda.enable_flash_sdp(spec["attention_backend"] != "math")
    return spec


class Exports:
    """Teachers written when a run has seen so many images."""

    def __init__(self, spec: Mapping[str, Any], **architecture: Any) -> None:
        """``architecture`` is what differs from our network: how the peer resamples its position grid."""
        self.spec, self.architecture = spec, spec["architecture"] | architecture

    def save(self, images: int, state: Mapping[str, torch.Tensor]) -> None:
        """Write the backbone's tensors, named as Meta does, if a teacher is asked for here."""
        if images in self.spec["exports"]:
            path = self.spec["output"] / f"{images}.pth"
            # Without registers nanopath has a parameter of no elements, which no other layout knows.
            torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items() if value.numel()}}, path)
            record = {"architecture": self.architecture, "step": images // self.spec["batch_size"]}
            path.with_suffix(".json").write_text(json.dumps(record))


def tiles(spec: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Photograph and encoded image of each tile."""
    table = pq.read_table(spec["tiles"], columns=["patient", "image_bytes"])
    return list(zip(table["patient"].to_pylist(), table["image_bytes"].to_pylist(), strict=True))


def decode(data: bytes) -> Image.Image:
    """A tile in RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def nested(overrides: list[str]) -> dict[str, Any]:
    """``["a.b=1"]`` to ``{"a": {"b": 1}}``, values as in YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
