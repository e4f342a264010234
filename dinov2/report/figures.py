"""Sheets of pictures of a run: augmented crops, patch features, neighbours, attention; and curves as a picture."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from torch import Tensor

from dinov2.logging.metrics import OF_CHANCE

MASK_GREY = 110
MAX_LOCAL_CROPS = 6  # shown per tile
NEIGHBOUR_ROWS, NEIGHBOUR_COLUMNS = 6, 8  # tiles asked about; each and its neighbours


def as_png(figure: Figure) -> bytes:
    """A drawing as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_curves(metrics: Mapping[str, np.ndarray]) -> Figure:
    """Every loss, absolute and of chance, the learning rate, gradient norms and the throughput against the step."""
    panels = {name.replace("_", " "): [name] for name in metrics if name.endswith("_loss") and "/" not in name}
    if of_chance := [name for name in metrics if name.endswith(OF_CHANCE)]:
        panels["losses, of chance"] = of_chance
    panels["learning rate"] = [name for name in metrics if name == "lr"]
    panels["gradient norm before clipping"] = [name for name in metrics if name.startswith("grad_norm")]
    panels["images per second"] = [name for name in metrics if name == "img_per_s"]
    panels = {title: names for title, names in panels.items() if names} or {"": []}
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


def draw_pca(tiles: Sequence[np.ndarray], features: Mapping[str, np.ndarray]) -> Figure:
    """Tiles, and under them the first three principal components of their patch features as red, green and blue.

    Features by label are (len(tiles), rows, columns, D), a row of maps each. The components are those of all tiles
    together, turned so that they come nearest to the last row's: colours mean the same from row to row.
    """
    scores, explained = {}, 0.0
    for label, maps in features.items():
        pca = PCA(3, svd_solver="full")
        found = pca.fit_transform(maps.reshape(-1, maps.shape[-1]).astype(np.float64))
        scores[label] = found / np.maximum(found.std(0), 1e-12)
        explained = np.nan_to_num(pca.explained_variance_ratio_).sum()  # of no variance where all features are equal
    (*_, last), rows = scores.values(), [("tile", tiles)]
    for label, found in scores.items():
        turned = found @ orthogonal_procrustes(found, last)[0]
        low, high = np.percentile(turned, [2, 98], axis=0)
        colours = np.clip((turned - low) / np.maximum(high - low, 1e-12), 0, 1)
        rows.append((label, colours.reshape(*features[label].shape[:3], 3)))
    return _sheet(rows, f"three principal components, {explained:.0%} of the variance in the last row")


def draw_attention(tiles: Sequence[np.ndarray], maps: np.ndarray) -> Figure:
    """Tiles, and under them attention (len(tiles), 1 + registers, rows, columns) to their patches, light where high.

    Each map has its own scale.
    """
    names = ["class token", *(f"register {number + 1}" for number in range(maps.shape[1] - 1))]
    return _sheet([("tile", tiles), *((name, maps[:, place]) for place, name in enumerate(names))], "")


def _sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], title: str) -> Figure:
    """Labelled rows of as many images each."""
    columns = len(rows[0][1])
    figure = Figure(figsize=(1.4 * columns + 0.4, 1.42 * len(rows) + (0.3 if title else 0)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (label, images), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for axis, image in zip(line, images, strict=True):
            _show(axis, image)
    if title:
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
