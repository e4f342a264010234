"""What the newest exports of a run make of tiles: crops, patch features, neighbours, attention, figures of embeddings.

All that is asked for here may be missing, and is then said to be.
"""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure

from dinov2.build.data import augmented_batch, open_data
from dinov2.configs import Config, load_config
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import Source
from dinov2.data.stream.derived import make_source
from dinov2.eval.datasets.images import ParquetTiles
from dinov2.eval.features import attention_maps, embed_images, patch_feature_map, read_tiles
from dinov2.eval.probe.spread import mean_cosine, rankme, site_leakage
from dinov2.hub import load_teacher
from dinov2.report.figures import as_png, draw_attention, draw_crops, draw_neighbours, draw_pca
from dinov2.report.page import Pictures
from dinov2.report.records import exports_of, step_of
from dinov2.utils.environment import memory_advice, select_device

logger = logging.getLogger("dinov2.report")

MAX_TILES = 512  # embedded, spread evenly over the dataset
SHOWN_TILES = 8  # as maps
MAX_EXPORTS = 4  # of which maps are drawn, the first and the newest among them


def draw_pictures(folder: Path, tiles: str | None = None, device: str | None = None) -> Pictures:
    """Draw what a run's folder, its data and its exports allow.

    Args:
        folder: of the run.
        tiles: Parquet dataset to embed, which must be there; None takes the validation patients' tiles, or the
            training data.
        device: None takes the GPU, where there is one.

    Raises FileNotFoundError or ValueError if ``tiles`` cannot be read, DeviceError if the device cannot be used; of all
    else what is missing is in the result.
    """
    drawn = Pictures()
    source = ParquetSource(tiles) if tiles else None
    exports = exports_of(folder)

    on = select_device(device) if device else drawn.attempt("Device", select_device)
    config = drawn.attempt("Pictures", lambda: load_config(folder / "config.yaml"))
    if config is None:
        return drawn
    data = drawn.attempt("Training data", lambda: open_data(config, _index_of(folder)))
    of = f"tiles of {tiles}"
    if data:
        patch = config.student.patch_size
        if crops := drawn.attempt("Crops", lambda: draw_crops(*augmented_batch(config, data), patch)):
            alt = "One tile a row: the tile, its two global crops with masked patches grey, and its local crops."
            _add(drawn, "crops.png", "Augmented crops, masked patches grey", alt, crops)
        if not source:
            held_out = [part for part in data.held_out if part]
            of = "validation tiles" if held_out else "training tiles"
            source = make_source(held_out) if held_out else data.source
    if not exports:
        drawn.missing.append("Embeddings: no teacher is exported yet; train.py --eval-only exports the newest one.")
    elif not source:
        drawn.missing.append("Embeddings: there are no tiles to embed; --tiles names a folder of Parquet shards.")
    elif on:
        drawn.attempt("Embeddings", lambda: _draw_embedded(drawn, config, exports, source, of, on))
    return drawn


def _index_of(folder: Path) -> Path | None:
    index = folder / "stream_index"
    return index if index.is_file() else None


def _add(drawn: Pictures, file: str, title: str, alt: str, figure: Figure) -> None:
    drawn.images[file] = (title, alt, as_png(figure))


def _draw_embedded(
    drawn: Pictures, config: Config, exports: list[Path], source: Source, of: str, on: torch.device
) -> None:
    norm = {"mean": config.augmentation.normalize_mean, "std": config.augmentation.normalize_std}
    newest, patch = exports[-1], config.student.patch_size
    with memory_advice("use --device cpu"):
        model = load_teacher(str(newest)).to(on)
        pixels = list(read_tiles(source, MAX_TILES))
        drawn.embeddings = embed_images(model, pixels, size=config.crops.global_crops_size, **norm)
        name = newest.parent.name
        figures = (f"{mean_cosine(drawn.embeddings):.4f}", f"{rankme(drawn.embeddings):.2f}")
        heads = ("tiles", "width", "mean off-diagonal cosine", "RankMe")
        drawn.tables[f"Embeddings of {of} by {name}"] = [heads, (*map(str, drawn.embeddings.shape), *figures)]
        if leakage := drawn.attempt("Site leakage", lambda: _site_leakage(source, drawn.embeddings)):
            drawn.tables[f"Sites of {of}"] = [("", "nearest ten", "all"), ("tiles of the same site", *leakage)]
        shown = with_tissue(pixels, SHOWN_TILES)
        size = map_side(shown, patch)

        def maps() -> Figure:
            features = {}
            for path in spread_out(exports, MAX_EXPORTS):
                teacher = model if path == newest else load_teacher(str(path)).to(on)
                features[f"step {step_of(path)}"] = patch_feature_map(teacher, shown, size=size, **norm)
            return draw_pca(shown, features)

        def attention() -> Figure:
            return draw_attention(shown, attention_maps(model, shown, size=size, **norm))

        if sheet := drawn.attempt("Patch features", maps):
            alt = "Tiles, and under them maps of their patch features in false colours, a row for each export."
            _add(drawn, "pca.png", f"Patch features of {of}, export by export", alt, sheet)
        if sheet := drawn.attempt("Attention", attention):
            alt = "Tiles, and under them which patches class token and registers attend to, light where much."
            _add(drawn, "attention.png", f"Attention in the last block of {name}", alt, sheet)
        alt = "Rows of tiles: one, then those with the nearest embeddings, with their cosines."
        title = f"Some of {of}, and the nearest to them by cosine of the class token"
        _add(drawn, "neighbours.png", title, alt, draw_neighbours(pixels, drawn.embeddings))


def map_side(tiles: list[np.ndarray], patch: int) -> int:
    """Side in px at which maps of tiles are made: about their own, in whole patches."""
    return max(patch, min(tiles[0].shape[:2]) // patch * patch)


def _site_leakage(source: Source, embeddings: np.ndarray) -> tuple[str, ...]:
    """Percentages of `site_leakage`, of the tiles that `read_tiles` takes."""
    origins = ParquetTiles([source], MAX_TILES).origins()
    if len(origins) != len(embeddings):
        raise ValueError("Some tiles are corrupt, so that it is not measured.")
    return tuple(f"{fraction:.1%}" for fraction in site_leakage(embeddings, origins))


def spread_out(items: list[Any], most: int) -> list[Any]:
    """At most so many items, the first and the last among them, at even distances."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def with_tissue(tiles: list[np.ndarray], count: int) -> list[np.ndarray]:
    """So many uint8 (H, W, 3) tiles at even distances among the half that holds most tissue: coloured, not bright."""
    fractions = []
    for tile in tiles:
        _, saturation, value = cv2.split(cv2.cvtColor(np.ascontiguousarray(tile), cv2.COLOR_RGB2HSV))
        fractions.append(((saturation > 20) & (value < 245) & (value > 20)).mean())
    enough = [tile for tile, fraction in zip(tiles, fractions, strict=True) if fraction >= np.median(fractions)]
    return spread_out(enough, count)
