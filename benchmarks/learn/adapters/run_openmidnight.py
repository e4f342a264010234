"""Train with OpenMidnight (ROOT/OpenMidnight), its recipe for a ViT-S, from scratch.

Ours are network, batch, crops and the size of the heads; overrides are keys of its configuration. Its learning rate is
one for starting from published weights: ``optim.base_lr=0.004`` is what Meta starts from scratch with. Tiles go
through its own streaming of Parquet. The code is as it was cloned but for `dinov2_code`.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import dinov2_code
import pyarrow as pa
import pyarrow.parquet as pq
from common import read_spec, tiles
from omegaconf import OmegaConf


def main() -> None:
    """Train as the specification says."""
    spec = read_spec()
    shards = spec["output"] / "tiles"
    shards.mkdir()
    groups, images = zip(*tiles(spec), strict=True)
    columns = {"slide_path": groups, "image_bytes": pa.array(images, pa.binary())}
    columns |= {name: [0] * len(images) for name in ("x", "y", "level")}
    pq.write_table(pa.table(columns), shards / "train-00000-of-00001.parquet", row_group_size=64)
    train = dinov2_code.import_training(Path(spec["root"]) / "OpenMidnight")
    configs = Path(spec["root"]) / "OpenMidnight" / "dinov2" / "configs"
    recipe = [OmegaConf.load(configs / name) for name in ("ssl_default_config.yaml", "train/vits14_reg4.yaml")]
    streaming = {"streaming_from_hf": True, "streaming_dataset_path": str(shards)}
    own = {"train": {"use_pretrained": False, "skip_checkpointer": True} | streaming}
    own |= {"optim": {"early_stop": spec["steps"]}}
    train.wandb.util.generate_id = lambda: spec["output"].parent.name  # gone from newer releases
    train.CONFIG_FILE_PATH = str(spec["output"] / "settings.yaml")
    dinov2_code.run(spec, train, OmegaConf.merge(dinov2_code.settings(spec, OmegaConf.merge(*recipe)), own))


if __name__ == "__main__":
    main()
