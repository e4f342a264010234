"""Train with Meta's dinov2 (ROOT/dinov2), its default configuration.

Ours are network, batch, crops and the size of the heads; overrides are keys of its configuration. The code is as it
was cloned but for `dinov2_code` and a dataset of our tiles in place of ImageNet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dinov2_code
from common import decode, read_spec, tiles
from omegaconf import OmegaConf


class TileDataset:
    """Tiles as Meta's loader takes a dataset."""

    def __init__(self, images: list[bytes], transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, tuple[()]]:
        return self.transform(decode(self.images[index])), ()


def main() -> None:
    """Train as the specification says."""
    spec = read_spec()
    train = dinov2_code.import_training(Path(spec["root"]) / "dinov2")
    images = [data for _, data in tiles(spec)]
    train.make_dataset = lambda *, dataset_str, transform, target_transform: TileDataset(images, transform)
    # The loader's order and the sampler are seeded with the number of the first step.
    make_loader = train.make_data_loader
    train.make_data_loader = lambda **kwargs: make_loader(**kwargs | {"seed": spec["seed"]})
    recipe = OmegaConf.load(Path(spec["root"]) / "dinov2" / "dinov2" / "configs" / "ssl_default_config.yaml")
    dinov2_code.run(spec, train, dinov2_code.settings(spec, recipe))


if __name__ == "__main__":
    main()
