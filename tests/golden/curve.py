"""The golden loss curve: a short fixed run on real tissue, and how it is recorded anew.

    python -m tests.golden.curve "why the curve changes"

overwrites ``demo_losses.json``. Only a deliberate change of what is computed is a reason.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dinov2.configs import load_config
from dinov2.export import save_teacher
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from tests.helpers.runs import TINY, read_metrics, write_tissue_shards

FILE = Path(__file__).with_name("demo_losses.json")
KEYS = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "kde_loss", "koleo_loss",
        "grad_norm_backbone")  # fmt: skip


def run(folder: Path) -> list[dict[str, float]]:
    """Metrics of each of the run's eight steps, fp32, one process, no loader workers.

    All randomness is numpy's, whose streams are fixed by specification: the starting weights come from a file that
    is drawn here, and there is no stochastic depth. torch's own streams may change between its versions.
    """
    shards = write_tissue_shards(folder / "shards")
    overrides = [*TINY, "student.drop_path_rate=0", f"train.streaming_dataset_path={shards}"]
    rng = np.random.Generator(np.random.Philox(1))
    # Rounding leaves 1 of a gain and 0 of everything else that torch drew.
    modules = {
        name: {
            key: value.round() + 0.05 * torch.from_numpy(rng.standard_normal(value.shape, np.float32))
            for key, value in module.state_dict().items()
        }
        for name, module in SSLMetaArch(load_config(None, overrides)).teacher.items()
    }
    save_teacher(folder / "weights.pth", modules, {})
    overrides += [f"MODEL.WEIGHTS={folder / 'weights.pth'}", "train.skip_checkpointer=true"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if main(["--output-dir", str(folder / "out"), *overrides]) != 0:
            raise RuntimeError("the golden run failed")
    finally:
        torch.set_num_threads(threads)
    return [{key: record[key] for key in KEYS} for record in read_metrics(folder / "out")]


def record(reason: str) -> None:
    """Write the curve of this machine to `FILE`."""
    with tempfile.TemporaryDirectory() as folder:
        steps = run(Path(folder))
    FILE.write_text(json.dumps({"reason": reason, "torch": torch.__version__, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('usage: python -m tests.golden.curve "why the curve changes"')
    record(sys.argv[1])
