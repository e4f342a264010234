"""Drawings of a run: metrics, augmented crops, patch features."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.logging.metrics import OF_CHANCE

MASK_GREY = 110
MAX_LOCAL_CROPS = 6  # shown per tile
PCA_PAIRS_PER_ROW = 4
NEIGHBOUR_ROWS, NEIGHBOUR_COLUMNS = 6, 8  # tiles asked about; each and its neighbours


def as_png(figure: Figure) -> bytes:
    """A drawing as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_curves(metrics: Mapping[str, np.ndarray]) -> Figure:
    """Every loss, absolute and of chance, the learning rate, gradient norms and the throughput against the step."""
    panels = {name.replace("_", " "): [name] for name in metrics if name.endswith("_loss")}
    if of_chance := [name for name in metrics if name.endswith(OF_CHANCE)]:
        panels["losses, of chance"] = of_chance
    panels["learning rate"] = ["lr"]
    panels["gradient norm before clipping"] = [name for name in metrics if name.startswith("grad_norm")]
    panels["images per second"] = ["img_per_s"]
    columns, rows = 3, -(-len(panels) // 3)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            steps, values = metrics["step"], metrics[name]
            label = name.removeprefix("grad_norm_").removesuffix(OF_CHANCE)
            window = len(values) // 50
            if window < 2:
                axis.plot(steps, values, lw=1.6, label=label)
                continue
            # Many values are drawn faint under their running mean over 2 % of the run.
            (line,) = axis.plot(steps, values, lw=0.8, alpha=0.3)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(steps[window - 1 :], smooth, lw=1.6, color=line.get_color(), label=label)
        if names == of_chance:
            axis.axhline(1, color="grey", lw=0.8, ls="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(fontsize=8, edgecolor="none", framealpha=0.8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def draw_crops(tiles: Sequence[np.ndarray], batch: Mapping[str, Tensor], patch_size: int) -> Figure:
    """Tiles, uint8 (H, W, 3), one per row, with the views that collation made of them, masked patches grey."""
    images = len(tiles)
    masked = []
    for crop, mask in zip(batch["global_crops"], batch["masks"], strict=True):
        grid = mask.reshape(crop.shape[1] // patch_size, -1)
        hidden = grid.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1).numpy()[..., None]
        image = crop.permute(1, 2, 0).numpy()
        masked.append(np.where(hidden, (0.1 * image + 0.9 * MASK_GREY).astype(np.uint8), image))
    local = batch["local_crops"].permute(0, 2, 3, 1).numpy()[: MAX_LOCAL_CROPS * images]
    views = [*tiles, *masked, *local]  # view-major
    titles = ["tile", "global 1", "global 2", *(f"local {i + 1}" for i in range(len(local) // images))]
    figure = Figure(figsize=(1.5 * len(titles), 1.55 * images + 0.3), layout="constrained")
    axes = figure.subplots(images, len(titles), squeeze=False)
    for axis, image in zip(axes.T.ravel(), views, strict=True):
        _show(axis, image)
    for axis, title, image in zip(axes[0], titles, views[::images], strict=True):
        axis.set_title(f"{title}\n{image.shape[1]} px", fontsize=9)
    return figure


def draw_pca(tiles: Sequence[np.ndarray], features: np.ndarray) -> Figure:
    """Tiles, each beside the first three principal components of its patch features as red, green and blue.

    The features are (len(tiles), rows, columns, D); the components are those of all tiles together.
    """
    pca = PCA(3, svd_solver="full")
    scores = pca.fit_transform(features.reshape(-1, features.shape[-1]).astype(np.float64))
    low, high = np.percentile(scores, [2, 98], axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(*features.shape[:3], 3)
    columns, lines = 2 * min(PCA_PAIRS_PER_ROW, len(tiles)), -(-len(tiles) // PCA_PAIRS_PER_ROW)
    figure = Figure(figsize=(1.6 * columns, 1.7 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for tile, colour, left, right in zip(tiles, colours, axes[::2], axes[1::2], strict=False):
        _show(left, tile)
        _show(right, colour)
    for axis in axes[2 * len(tiles) :]:
        axis.set_visible(False)
    fraction = np.nan_to_num(pca.explained_variance_ratio_).sum()  # of no variance where all features are equal
    title = f"tiles, and three principal components of their patch features ({fraction:.0%} of the variance)"
    figure.suptitle(title, fontsize=10)
    return figure


def draw_neighbours(tiles: Sequence[np.ndarray], embeddings: np.ndarray) -> Figure:
    """Some tiles, one per row, each followed by the tiles whose embeddings (N, D) are nearest by cosine.

    Two tiles that are told apart by chance only have neighbours of any kind.
    """
    rows, columns = min(NEIGHBOUR_ROWS, len(tiles)), min(NEIGHBOUR_COLUMNS, len(tiles))
    directions = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    asked = np.arange(rows) * len(tiles) // rows
    similarity = directions[asked] @ directions.T
    similarity[np.arange(rows), asked] = np.inf  # each tile first, even beside copies of it
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :columns]
    cosines = np.take_along_axis(similarity, nearest, axis=1)
    figure = Figure(figsize=(1.5 * columns, 1.55 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, tile, cosine in zip(axes.ravel(), nearest.ravel(), cosines.ravel(), strict=True):
        _show(axis, tiles[tile])
        axis.set_title(f"{cosine:.3f}" if np.isfinite(cosine) else f"tile {tile}", fontsize=8)
    return figure


def _show(axis: Axes, image: np.ndarray) -> None:
    """An image in a thin frame, so that white ones have an edge."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("lightgrey")
