"""Features of many tiles from a callable backbone, shared out over the processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from dinov2.distributed import (
    all_gather_rows,
    broadcast_object,
    get_global_rank,
    get_global_size,
    is_main_process,
)
from dinov2.eval.datasets.images import TileImages, UnreadableImage
from dinov2.eval.features import centred_square

logger = logging.getLogger("dinov2")

POOLINGS = ("cls", "cls_mean")
_READERS = 8


@dataclass(frozen=True)
class Embedding:
    """How tiles become features.

    Attributes:
        pooling: ``cls``, the class token (D), or ``cls_mean``, followed by the mean of the patch tokens (2 D).
        size: side in pixels to which the largest centred square of each tile is resized, bicubic.
        batch_size: tiles per forward pass and process.
        mean: per channel, as in training.
        std: per channel, as in training.
        autocast: dtype of autocast, or None for the weights' own.
        show_progress: draw a progress bar on rank 0.
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


def extract_features(
    backbone: Callable[..., Tensor],
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
        backbone: images (B, 3, S, S) to class tokens (B, D); for ``cls_mean``, called with ``is_training=True``, to
            a dict with ``x_norm_clstoken`` and ``x_norm_patchtokens``.
        images: N tiles.
        how: sizes and numbers.
        device: of the backbone; None takes that of its parameters.
        leave_out_damaged: leave unreadable tiles out with a warning.

    Returns:
        float32 (M, D), and the numbers of the M tiles, int64 ascending.

    Raises:
        ValueError: on all ranks, where there is no tile, an image is unreadable, or a feature is not finite.
    """
    if not len(images):
        raise ValueError("There are no tiles to embed; at least 1 is needed.")
    device = device or next(iter(backbone.parameters())).device
    rank, world, count = get_global_rank(), get_global_size(), len(images)
    batches = -(-count // how.batch_size)
    own = [
        min(first + rank, batches - 1) for first in range(0, batches, world)
    ]  # the last may be a repetition
    failures: dict[int, str] = {}
    gathered = []
    with torch.no_grad(), _evaluation_mode(backbone):
        reading = _read_batches(images, own, how, failures)
        bar = tqdm(
            reading, "features", len(own), disable=not (how.show_progress and is_main_process()), leave=False
        )
        for pixels in bar:
            features = _forward(backbone, pixels.to(device), how)
            gathered.append(all_gather_rows(features).cpu())
    failures = {index: text for part in _from_all(failures) for index, text in part.items()}
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


def _from_all(value: dict[int, str]) -> list[dict[int, str]]:
    return [broadcast_object(value, src) for src in range(get_global_size())]


def _read_batches(
    images: TileImages, batches: Sequence[int], how: Embedding, failures: dict[int, str]
) -> Iterator[Tensor]:
    """uint8 (batch_size, 3, S, S) per batch, the next being read meanwhile; tiles past the last repeat it."""

    def read(index: int) -> np.ndarray:
        try:
            return centred_square(images.read(index), how.size)
        except (UnreadableImage, OSError) as error:
            failures[index] = str(error)
            return np.zeros((how.size, how.size, 3), np.uint8)

    def start(batch: int) -> list:
        first = batch * how.batch_size
        wanted = range(first, min(first + how.batch_size, len(images)))
        return [pool.submit(read, index) for index in wanted]

    with ThreadPoolExecutor(_READERS) as pool:
        upcoming = start(batches[0])
        for following in [*batches[1:], None]:
            reading, upcoming = upcoming, [] if following is None else start(following)
            tiles = [future.result() for future in reading]
            tiles += [tiles[-1]] * (how.batch_size - len(tiles))
            yield torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)


def _forward(backbone: Callable[..., Tensor], pixels: Tensor, how: Embedding) -> Tensor:
    kind = pixels.device.type
    with torch.autocast(kind, how.autocast) if how.autocast else nullcontext():
        x = normalize(pixels, how.mean, how.std)
        if how.pooling == "cls":
            return backbone(x).float()
        tokens = backbone(x, is_training=True)
    parts = [tokens["x_norm_clstoken"].float(), tokens["x_norm_patchtokens"].float().mean(1)]
    return torch.cat(parts, dim=1)


@contextmanager
def _evaluation_mode(backbone: Callable[..., Tensor]) -> Iterator[None]:
    """Evaluation mode within, and for every module its own mode after."""
    modes = (
        [(module, module.training) for module in backbone.modules()]
        if isinstance(backbone, nn.Module)
        else []
    )
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
