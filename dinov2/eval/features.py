"""Features of tiles: the one path from pixels through a backbone, for probes, embeddings and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.data.parquet.source import ParquetSource
from dinov2.distributed import (
    all_gather_rows,
    broadcast_object,
    get_global_rank,
    get_global_size,
    is_main_process,
)
from dinov2.eval.datasets.images import TileImages, UnreadableImage, read_tiles
from dinov2.hub.pixels import Colours, centred_square, network_input
from dinov2.hub.teacher import POOLINGS

logger = logging.getLogger("dinov2")

_READERS = 8

Backbone = Callable[..., Tensor]
"""Images (B, 3, H, W) to class tokens (B, D); called with ``is_training=True``, to a dict with ``x_norm_clstoken`` and
``x_norm_patchtokens``."""


@dataclass(frozen=True)
class Embedding:
    """How tiles become features.

    Attributes:
        pooling: ``cls``, the class token (D), or ``cls_mean``, followed by the mean of the patch tokens (2 D).
        size: side in pixels to which the largest centred square of each tile is resized, bicubic.
        batch_size: tiles per forward pass and process.
        mean, std: per channel, as in training.
        autocast: dtype of autocast, or None for the weights' own.
        show_progress: draw a progress bar on rank 0.

    Raises:
        ValueError: if a value is out of range.
    """

    pooling: str = "cls"
    size: int = 224
    batch_size: int = 64
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    autocast: torch.dtype | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"Pooling {self.pooling!r} is none of {', '.join(POOLINGS)}.")
        if self.batch_size < 1 or self.size < 1:
            raise ValueError(f"Batch size {self.batch_size} and size {self.size} must both be at least 1.")


@torch.no_grad()
def embed_tiles(
    backbone: Backbone, tiles: Sequence[np.ndarray], how: Embedding, device: torch.device | None = None
) -> Tensor:
    """Embed uint8 (H, W, 3) tiles at the sizes that they have, float32 (N, D) or (N, 2 D) on the device, N > 0.

    Tiles of one shape go through the network together; ``size`` and ``batch_size`` are the caller's business.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, tile in enumerate(tiles):
        alike.setdefault(tile.shape, []).append(place)
    parts = [_forward(backbone, [tiles[place] for place in places], how, device) for places in alike.values()]
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([place for places in alike.values() for place in places])
    return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]


def _forward(backbone: Backbone, tiles: Sequence[np.ndarray], how: Embedding, device: torch.device | None) -> Tensor:
    device = device or _device_of(backbone)
    x = network_input(tiles, Colours(how.mean, how.std), device)
    with torch.autocast(device.type, how.autocast) if how.autocast else nullcontext():
        if how.pooling == "cls":
            return backbone(x).float()
        tokens = backbone(x, is_training=True)
    return torch.cat([tokens["x_norm_clstoken"].float(), tokens["x_norm_patchtokens"].float().mean(1)], dim=1)


def _device_of(backbone: Backbone) -> torch.device:
    return next(iter(backbone.parameters())).device


def embed_images(
    model: nn.Module,
    images: Iterable[np.ndarray] | str | Path,
    *,
    size: int = 224,
    batch_size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Embed images with a teacher: class tokens, float32 (N, D), on the model's device and without gradients.

    Args:
        model: from `dinov2.hub.load_teacher`.
        images: uint8 (H, W, 3) RGB arrays, or a Parquet dataset, read whole.
        size, batch_size, mean, std: see `Embedding`.

    Raises:
        FileNotFoundError, ValueError: if there are no images, or the dataset is of another format.
    """
    how, features = Embedding("cls", size, batch_size, mean, std), []
    if isinstance(images, (str, Path)):
        images = read_tiles(ParquetSource(str(images)))
    squares = (centred_square(image, size) for image in images)
    while batch := list(islice(squares, batch_size)):
        features.append(embed_tiles(model, batch, how).cpu())
    if not features:
        raise ValueError("There are no images to embed; at least 1 is needed.")
    return torch.cat(features).numpy()


@torch.no_grad()
def patch_feature_map(
    model: nn.Module,
    images: Sequence[np.ndarray],
    *,
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Patch features of a teacher, float32 (N, rows, columns, D), in one forward pass; see `embed_images`."""
    squares = [centred_square(image, size) for image in images]
    x = network_input(squares, Colours(mean, std), _device_of(model))
    patches = model(x, is_training=True)["x_norm_patchtokens"].float().cpu()
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).numpy()


def extract_features(
    backbone: Backbone,
    images: TileImages,
    how: Embedding,
    device: torch.device | None = None,
    leave_out_damaged: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of tiles in their order, on every process. All ranks must call, with the same arguments.

    Batches are shared out whole and are of one size, so that features are bit for bit those of one process,
    whatever the number of processes. Every rank makes the same number of forward passes, as sharded backbones need.
    Modes and random states are left as they were.

    Args:
        backbone: perhaps sharded, in any mode.
        images: N tiles.
        how: sizes and numbers.
        device: of the backbone; None takes that of its parameters.
        leave_out_damaged: leave unreadable tiles out with a warning.

    Returns:
        float32 (M, D), and the numbers of the M tiles, int64 ascending.

    Raises:
        ValueError: on all ranks, if there is no tile, an image is unreadable, or a feature is not finite.
    """
    if not len(images):
        raise ValueError("There are no tiles to embed; at least 1 is needed.")
    device = device or _device_of(backbone)
    rank, world, count = get_global_rank(), get_global_size(), len(images)
    batches = -(-count // how.batch_size)
    # The last may be a repetition.
    own = [min(first + rank, batches - 1) for first in range(0, batches, world)]
    failures: dict[int, str] = {}
    gathered = []
    hidden = not (how.show_progress and is_main_process())
    with _evaluation_mode(backbone):
        for tiles in tqdm(_read_batches(images, own, how, failures), "features", len(own), disable=hidden, leave=False):
            gathered.append(all_gather_rows(embed_tiles(backbone, tiles, how, device)).cpu())
    for src in range(world):
        failures |= broadcast_object(dict(failures), src)
    if failures and not (leave_out_damaged and len(failures) < count):
        raise ValueError(failures[min(failures)])
    if failures:
        logger.warning("Left out %d of %d tiles: %s", len(failures), count, failures[min(failures)])
    kept = np.setdiff1d(np.arange(count), list(failures))
    features = torch.cat(gathered).numpy()[kept]
    if not np.isfinite(features).all():
        bad = kept[~np.isfinite(features).all(1)]
        raise ValueError(
            f"The features of {len(bad)} tiles are not finite, those of {images.name(int(bad[0]))} for one."
        )
    return features, kept


def _read_batches(
    images: TileImages, batches: Sequence[int], how: Embedding, failures: dict[int, str]
) -> Iterator[list[np.ndarray]]:
    """Squares of each batch, the next being read meanwhile; a short batch is filled up with its last tile."""

    def read(index: int) -> np.ndarray:
        try:
            return centred_square(images.read(index), how.size)
        except (UnreadableImage, OSError) as error:
            failures[index] = str(error)
            return np.zeros((how.size, how.size, 3), np.uint8)

    def start(batch: int) -> list:
        first = batch * how.batch_size
        return [pool.submit(read, i) for i in range(first, min(first + how.batch_size, len(images)))]

    with ThreadPoolExecutor(_READERS) as pool:
        upcoming = start(batches[0])
        for following in [*batches[1:], None]:
            reading, upcoming = upcoming, [] if following is None else start(following)
            tiles = [future.result() for future in reading]
            yield tiles + [tiles[-1]] * (how.batch_size - len(tiles))


@contextmanager
def _evaluation_mode(backbone: Backbone) -> Iterator[None]:
    """Evaluation mode within, and for every module its own mode after."""
    modules = list(backbone.modules()) if isinstance(backbone, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
