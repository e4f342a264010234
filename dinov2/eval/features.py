"""Features of tiles: the one path from pixels through a backbone, for probes, embeddings and reports."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.data.parquet.source import ParquetSource
from dinov2.distributed import all_gather_rows, broadcast_object, get_global_rank, get_global_size, is_main_process
from dinov2.eval.datasets.images import TileImages, UnreadableImage, read_tiles
from dinov2.hub.pixels import Colours, centred_square, network_input
from dinov2.hub.teacher import POOLINGS

logger = logging.getLogger("dinov2")

_READERS = 8
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Embedding:
    """Options from tiles to features; ValueError if a value is out of range."""

    pooling: str = "cls"  # the class token (D), or cls_mean: followed by the mean of the patch tokens (2 D)
    size: int = 224  # side in px to which the largest centred square of each tile is resized, bicubic
    batch_size: int = 64  # tiles per forward pass and process
    mean: Sequence[float] = IMAGENET_MEAN  # per channel, as in training
    std: Sequence[float] = IMAGENET_STD
    autocast: torch.dtype | None = None  # None computes in the weights' own dtype
    show_progress: bool = False  # draw a bar on rank 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"Pooling {self.pooling!r} is none of {', '.join(POOLINGS)}.")
        if self.batch_size < 1 or self.size < 1:
            raise ValueError(f"Batch size {self.batch_size} and size {self.size} must both be at least 1.")


def device_of(backbone: nn.Module) -> torch.device:
    """Device of a backbone's parameters."""
    return next(iter(backbone.parameters())).device


@torch.no_grad()
def embed_tiles(backbone: nn.Module, tiles: Sequence[np.ndarray], embedding: Embedding) -> Tensor:
    """Embed uint8 (H, W, 3) tiles at the sizes that they have, float32 (N, D) or (N, 2 D) on the device, N > 0.

    Tiles of one shape go through the network together; ``size`` and ``batch_size`` are the caller's business.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, tile in enumerate(tiles):
        alike.setdefault(tile.shape, []).append(index)
    device, parts = device_of(backbone), []
    for members in alike.values():
        x = network_input([tiles[index] for index in members], Colours(embedding.mean, embedding.std), device)
        with torch.autocast(device.type, embedding.autocast) if embedding.autocast else nullcontext():
            found = backbone(x) if embedding.pooling == "cls" else backbone(x, is_training=True)
        if embedding.pooling == "cls_mean":
            found = torch.cat([found["x_norm_clstoken"].float(), found["x_norm_patchtokens"].float().mean(1)], dim=1)
        parts.append(found.float())
    order = np.argsort([index for members in alike.values() for index in members])
    return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.from_numpy(order).to(device)]


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

    Images are uint8 (H, W, 3) RGB arrays, or a Parquet dataset, read whole; for the numbers see `Embedding`. Raises
    FileNotFoundError or ValueError if there are no images, or the dataset is of another format.
    """
    embedding, features = Embedding("cls", size, batch_size, mean, std), []
    if isinstance(images, (str, Path)):
        images = read_tiles(ParquetSource(str(images)))
    squares = (centred_square(image, size) for image in images)
    while batch := list(islice(squares, batch_size)):
        features.append(embed_tiles(model, batch, embedding).cpu())
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
    x = network_input(squares, Colours(mean, std), device_of(model))
    patches = model(x, is_training=True)["x_norm_patchtokens"].float().cpu()
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side)).numpy()


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    images: Sequence[np.ndarray],
    *,
    size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Attention from class token and registers to patches in the last block, mean of the heads; see `embed_images`.

    Returns float32 (N, 1 + registers, rows, columns), of one forward pass. Raises ValueError if the backbone has no
    blocks with a joint projection ``attn.qkv``, as vision transformers have.
    """
    try:
        attention, prefix = model.blocks[-1].attn, model.num_prefix_tokens
        seen: list[Tensor] = []
        hook = attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"A {type(model).__name__} has no attention of a known kind ({error}).") from error
    try:
        squares = [centred_square(image, size) for image in images]
        model(network_input(squares, Colours(mean, std), device_of(model)), is_training=True)
    finally:
        hook.remove()
    q, k, _ = (
        seen[-1]
        .float()
        .reshape(len(images), -1, 3, attention.num_heads, model.embed_dim // attention.num_heads)
        .permute(2, 0, 3, 1, 4)
    )
    weights = (q[:, :, :prefix] @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[..., prefix:]
    side = round(weights.shape[-1] ** 0.5)
    return weights.unflatten(-1, (side, side)).cpu().numpy()


def extract_features(
    backbone: nn.Module, images: TileImages, embedding: Embedding, skip_corrupt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Features of tiles in their order, on every process. All ranks must call, with the same arguments.

    Batches are shared out whole and are of one size, so that features are bit for bit those of one process,
    whatever the number of processes. Every rank makes the same number of forward passes, as sharded backbones need.
    Modes and random states are left as they were.

    Args:
        backbone: perhaps sharded, in any mode; images (B, 3, H, W) to class tokens (B, D), or with
            ``is_training=True`` to a dict with ``x_norm_clstoken`` and ``x_norm_patchtokens``.
        skip_corrupt: leave unreadable tiles out with a warning.

    Returns:
        float32 (M, D), and the numbers of the M tiles, int64 ascending.

    Raises:
        ValueError: on all ranks, if there is no tile, an image is unreadable, or a feature is not finite.
    """
    if not len(images):
        raise ValueError("There are no tiles to embed; at least 1 is needed.")
    rank, world, count, size = get_global_rank(), get_global_size(), len(images), embedding.batch_size
    batches = -(-count // size)
    # The last may be a repetition.
    own = [min(first + rank, batches - 1) * size for first in range(0, batches, world)]
    failures: dict[int, str] = {}

    def read(index: int) -> np.ndarray:
        try:
            return centred_square(images.read(index), embedding.size)
        except (UnreadableImage, OSError) as error:
            failures[index] = str(error)
            return np.zeros((embedding.size, embedding.size, 3), np.uint8)

    indices = (index for first in own for index in range(first, min(first + size, count)))
    squares = map_ahead(read, indices, _READERS, size)
    gathered = []
    hidden = not (embedding.show_progress and is_main_process())
    with evaluation_mode(backbone):
        for first in tqdm(own, "features", disable=hidden or None, leave=False):
            tiles = list(islice(squares, min(size, count - first)))
            tiles += tiles[-1:] * (size - len(tiles))
            gathered.append(all_gather_rows(embed_tiles(backbone, tiles, embedding)).cpu())
    for src in range(world):
        failures |= broadcast_object(dict(failures), src)
    if failures and not (skip_corrupt and len(failures) < count):
        raise ValueError(failures[min(failures)])
    if failures:
        logger.warning("Left out %d of %d tiles: %s", len(failures), count, failures[min(failures)])
    kept = np.setdiff1d(np.arange(count), list(failures))
    features = torch.cat(gathered).numpy()[kept]
    if len(bad := kept[~np.isfinite(features).all(1)]):
        raise ValueError(
            f"The features of {len(bad)} tiles are not finite, those of {images.name(int(bad[0]))} for one."
        )
    return features, kept


def map_ahead(
    function: Callable[[_Item], _Value], items: Iterable[_Item], workers: int, ahead: int
) -> Generator[_Value, None, None]:
    """Map over items in threads and in order, up to so many items before they are asked for."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and for every module its own mode after."""
    modes = {module: module.training for module in backbone.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
