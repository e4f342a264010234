"""Features of tiles from a loaded teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from dinov2.data.augment.ops import resized_crop
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import DecodeError, EncodedSample, Source

logger = logging.getLogger("dinov2")


def read_tiles(source: Source, limit: int | None = None) -> Iterator[np.ndarray]:
    """Decode tiles in stored order, leaving out damaged rows with a warning.

    Args:
        source: an open dataset.
        limit: take this many rows, spread evenly over the dataset; None takes all.

    Yields:
        uint8 (H, W, 3) RGB.
    """
    count = source.num_rows if limit is None else min(limit, source.num_rows)
    wanted = np.arange(count) * source.num_rows // count
    ends = np.cumsum(source.unit_rows)
    units = np.searchsorted(ends, wanted, side="right")
    rows = wanted - (ends - source.unit_rows)[units]
    for unit, places in groupby(zip(units.tolist(), rows.tolist(), strict=True), key=lambda place: place[0]):
        in_unit = [row for _, row in places]
        for row, (slide, data) in zip(in_unit, source.read(unit, in_unit), strict=True):
            try:
                yield source.decode(EncodedSample(0, unit, row, slide, data))
            except DecodeError as error:
                logger.warning("Left out %s: %s.", source.describe(unit, row), error)


def embed_images(
    model: nn.Module,
    images: Iterable[np.ndarray] | str | Path,
    *,
    size: int = 224,
    batch_size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """CLS features of a teacher, float32 (N, D), on the model's device and without gradients.

    Args:
        model: from `dinov2.hub.load_teacher`.
        images: uint8 (H, W, 3) RGB arrays, or a Parquet dataset, read whole.
        size: side in pixels to which the largest centred square of each image is resized.
        batch_size: images per forward pass.
        mean: per channel, as in training.
        std: per channel, as in training.

    Raises:
        FileNotFoundError, ValueError: there are no images, or the dataset is of another format.
    """
    if isinstance(images, (str, Path)):
        images = read_tiles(ParquetSource(str(images)))
    images, features = iter(images), []
    while batch := list(islice(images, batch_size)):
        features.append(_forward(model, batch, size, mean, std)["x_norm_clstoken"].float().cpu())
    if not features:
        raise ValueError("There are no images to embed; at least 1 is needed.")
    return torch.cat(features).numpy()


def patch_feature_map(
    model: nn.Module,
    images: Sequence[np.ndarray],
    *,
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Patch features of a teacher, float32 (N, rows, columns, D), in one forward pass; see `embed_images`."""
    patches = _forward(model, images, size, mean, std)["x_norm_patchtokens"].float().cpu()
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).numpy()


@torch.inference_mode()
def _forward(
    model: nn.Module, images: Sequence[np.ndarray], size: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Tensor]:
    squares = torch.from_numpy(np.stack([centred_square(image, size) for image in images]))
    pixels = squares.permute(0, 3, 1, 2).to(next(model.parameters()).device)
    return model.forward_features(normalize(pixels, mean, std))


def centred_square(image: np.ndarray, size: int) -> np.ndarray:
    """Largest centred square of a uint8 (H, W, 3) image, resized to (size, size), bicubic with antialiasing."""
    height, width = image.shape[:2]
    side = min(height, width)
    return resized_crop(image, (height - side) // 2, (width - side) // 2, side, side, size)
