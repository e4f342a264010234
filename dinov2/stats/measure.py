"""Mean and standard deviation of the colours of tiles, with standard errors by slide."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dinov2.build.data import OpenData, open_data
from dinov2.configs import load_config
from dinov2.data.source import DecodeError, EncodedSample, Source
from dinov2.utils.files import write_text
from dinov2.utils.seeding import sample_rng

_STREAM = 1 << 35  # of the draw of a sample


@dataclass(frozen=True)
class ColourStatistics:
    """Red, green and blue in [0, 1], float64 (3,) each.

    Attributes:
        mean: over all pixels, every tile counting alike.
        std: standard deviation over all pixels.
        mean_error: standard error of the mean, for slides as a sample of all slides: tiles of one are alike. NaN where
            fewer than two slides are known.
        std_error: the same of the standard deviation, to first order.
        tiles: number that was read.
        slides: of these; a row group whose tiles tell none counts as one.
        corrupt: further tiles that cannot be decoded.
    """

    mean: np.ndarray
    std: np.ndarray
    mean_error: np.ndarray
    std_error: np.ndarray
    tiles: int
    slides: int
    corrupt: int


def colour_statistics(data: OpenData, tiles: int = 0, seed: int = 0, workers: int = 8) -> ColourStatistics:
    """Measure a dataset, or a mixture, whose parts count as their weights say.

    Args:
        data: an open dataset.
        tiles: size of the sample, drawn without replacement, or of slides that are read online the first ones; 0: all.
        seed: of the draw.
        workers: threads that read and decode; they change nothing in the result.

    Raises:
        ValueError: if no tile can be decoded, or all are asked for of tiles that are drawn without end.
    """
    clusters: dict[str, np.ndarray] = {}  # by slide
    count = corrupt = 0
    for name, source, weight in zip(data.names, data.sources, data.weights, strict=True):
        fraction = weight / sum(data.weights)
        sums, read, failed = _read(source, _by_group(source, tiles and max(1, round(tiles * fraction)), seed), workers)
        if not read:
            raise ValueError(f"None of {failed} tiles of '{name}' can be decoded.")
        for slide, of_slide in sums.items():
            slide = slide if isinstance(slide, str) else f"{name}: {slide}"
            clusters[slide] = clusters.get(slide, 0) + fraction / read * of_slide
        count, corrupt = count + read, corrupt + failed
    total = np.stack(list(clusters.values()))  # (slides, 3, 3)
    mass, first, second = total.sum(0)
    mean, square = first / mass, second / mass
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # How far each slide moves the estimates: linearisation, with slides as the units that were sampled.
    of_mean = total[:, 1] - mean * total[:, 0]
    of_variance = total[:, 2] - square * total[:, 0] - 2 * mean * of_mean
    slides = len(clusters)
    scale = np.sqrt(slides / (slides - 1)) if slides > 1 else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        std_error = scale * np.linalg.norm(of_variance, axis=0) / (2 * std)
    mean_error = scale * np.linalg.norm(of_mean, axis=0)
    return ColourStatistics(mean, std, mean_error, std_error, count, slides, corrupt)


def _by_group(source: Source, tiles: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Row groups and rows of a sample, ascending."""
    if getattr(source, "is_endless", False):
        if not tiles:
            raise ValueError("The tiles are drawn without end, so that all cannot be read; give --tiles a number.")
        located = source.order(seed=seed, lanes=1, block_rows=1).locate(np.arange(tiles))
        groups, rows = located.group, located.row
    else:
        total = source.num_rows
        is_sample = 0 < tiles < total
        numbers = sample_rng(seed, 0, _STREAM).choice(total, tiles, replace=False) if is_sample else np.arange(total)
        numbers = np.sort(numbers)
        ends = np.cumsum(source.group_rows)
        groups = np.searchsorted(ends, numbers, side="right")
        rows = numbers - (ends - source.group_rows)[groups]
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    yield from zip(groups[starts].tolist(), np.split(rows, starts[1:]), strict=True)


def _read(
    source: Source, chosen: Iterator[tuple[int, np.ndarray]], workers: int
) -> tuple[dict[str | int, np.ndarray], int, int]:
    """Sums over tiles of 1, mean values and mean squares, float64 (3, 3), by slide, or row group where none is told.

    Also the number of tiles, and that of further ones that cannot be decoded.
    """

    def read(item: tuple[int, np.ndarray]) -> tuple[dict[str | int, np.ndarray], int]:
        group, rows = item
        sums: dict[str | int, np.ndarray] = {}
        failed = 0
        for row, (slide, stored) in zip(rows.tolist(), source.read(group, rows.tolist()), strict=True):
            try:
                pixels = source.decode(EncodedSample(0, group, row, slide, stored)).reshape(-1, 3) / 255.0
            except DecodeError:
                failed += 1
            else:
                moments = np.stack([np.ones(3), pixels.mean(0), (pixels**2).mean(0)])
                sums[slide or group] = sums.get(slide or group, 0) + moments
        return sums, failed

    total: dict[str | int, np.ndarray] = {}
    count = corrupt = 0
    with ThreadPoolExecutor(workers) as pool, tqdm(desc="tiles", unit="tile", disable=None, leave=False) as bar:
        for sums, failed in pool.map(read, chosen):  # in order, so that rounding does not depend on the threads
            for slide, moments in sums.items():
                total[slide] = total.get(slide, 0) + moments
                count += int(moments[0, 0])
            corrupt += failed
            bar.update(count + corrupt - bar.n)
    return total, count, corrupt


def as_yaml(found: ColourStatistics, names: Sequence[str]) -> str:
    """The lines of a configuration, with what they were measured on."""
    mean, std = ("[" + ", ".join(f"{value:.4f}" for value in values) + "]" for values in (found.mean, found.std))
    errors = (" ".join(f"{value:.4f}" for value in values) for values in (found.mean_error, found.std_error))
    several = "# standard errors: {} of the means, {} of the deviations".format(*errors)
    lines = [
        f"# {found.tiles:,} tiles of {found.slides:,} slides of {', '.join(names)}"
        + (f"; {found.corrupt:,} more cannot be decoded" if found.corrupt else ""),
        several if found.slides > 1 else "# standard errors: unknown, since they take two slides or more",
        "augmentation:",
        f"  normalize_mean: {mean}",
        f"  normalize_std: {std}",
    ]
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace) -> None:
    """Print, and perhaps write, what the arguments ask for."""
    data = open_data(load_config(args.config_file, args.overrides))
    found = colour_statistics(data, args.tiles, args.seed, args.workers)
    if args.json:
        figures = {name: _plain(value) for name, value in vars(found).items()}
        text = json.dumps(figures | {"datasets": list(data.names)}, indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
            return
        write_text(Path(args.json), text)
    sys.stdout.write(as_yaml(found, data.names))


def _plain(value: np.ndarray | int) -> list[float | None] | int:
    return value if isinstance(value, int) else [float(item) if np.isfinite(item) else None for item in value]
