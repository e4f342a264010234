"""Colour statistics against numpy on all pixels at once, and their standard errors against repeated draws."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dinov2.build.data import open_data
from dinov2.configs import load_config
from dinov2.data.source import EncodedSample
from dinov2.stats.__main__ import main
from dinov2.stats.measure import colour_statistics

SLIDES, TILES, SIDE = 6, 8, 16


def write(folder: Path, pixels: np.ndarray, slides: list[str], corrupt: int = 0) -> Path:
    """Tiles uint8 (N, H, W, 3) as PNG in one shard of row groups of five."""
    folder.mkdir(parents=True)
    stored = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        stored.append(buffer.getvalue())
    stored[:corrupt] = [b"no image"] * corrupt
    paths = [f"{slide}/{number}_0_0.png" for number, slide in enumerate(slides)]
    table = pa.table({"path": paths, "jpeg": pa.array(stored, pa.binary())})
    pq.write_table(table, folder / "shard-00000.parquet", row_group_size=5, use_dictionary=False)
    return folder


def tissue(seed: int, slides: int = SLIDES) -> tuple[np.ndarray, list[str]]:
    """Tiles whose colours differ more between slides than within."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(80, 200, (slides, 1, 1, 1, 3))
    tile = rng.normal(0, 12, (slides, TILES, 1, 1, 3))
    pixels = colour + tile + rng.normal(0, 25, (slides, TILES, SIDE, SIDE, 3))
    names = [f"slide_{slide}" for slide in range(slides) for _ in range(TILES)]
    return np.clip(pixels, 0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE, 3), names


def measured(*folders: Path, tiles: int = 0, weights: tuple[float, ...] = (), **options: int):
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(folders, weights, strict=False)]
    where = [f"data.datasets={json.dumps(entries)}"] if weights else [f"data.path={folders[0]}"]
    return colour_statistics(open_data(load_config(None, where)), tiles, **options)


def test_all_tiles_equal_numpy_whatever_the_threads(tmp_path: Path):
    pixels, slides = tissue(0)
    folder = write(tmp_path / "tiles", pixels, slides)
    found = measured(folder)
    values = pixels.reshape(-1, 3).astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.std, values.std(0), rtol=0, atol=1e-12)
    assert (found.tiles, found.slides, found.corrupt) == (SLIDES * TILES, SLIDES, 0)
    one = measured(folder, workers=1)
    assert all(np.array_equal(getattr(one, name), getattr(found, name)) for name in vars(found))
    # Slides of equal size: the error of a mean of cluster means.
    of_slides = values.reshape(SLIDES, -1, 3).mean(1)
    np.testing.assert_allclose(found.mean_error, of_slides.std(0, ddof=1) / SLIDES**0.5, rtol=1e-9)


def test_standard_errors_are_the_spread_of_what_other_slides_give(tmp_path: Path):
    found = [measured(write(tmp_path / str(seed), *tissue(seed, slides=20)), workers=2) for seed in range(1, 41)]
    for value, error in (("mean", "mean_error"), ("std", "std_error")):
        spread = np.std([getattr(one, value) for one in found], 0, ddof=1)
        claimed = np.mean([getattr(one, error) for one in found], 0)
        # The spread of 40 draws has a relative error of a ninth.
        assert np.all(np.abs(claimed / spread - 1) < 0.45), (claimed, spread)


def test_a_sample_is_drawn_by_its_seed_and_is_near(tmp_path: Path):
    pixels, slides = tissue(0)
    folder = write(tmp_path / "tiles", pixels, slides)
    whole, sample, again, other = measured(folder), *(measured(folder, tiles=30, seed=seed) for seed in (1, 1, 2))
    assert (
        sample.tiles == 30 and np.array_equal(sample.mean, again.mean) and not np.array_equal(sample.mean, other.mean)
    )
    assert np.all(np.abs(sample.mean - whole.mean) < 4 * whole.mean_error)
    assert measured(folder, tiles=1000).tiles == len(slides)


def test_parts_of_a_mixture_count_by_their_weights(tmp_path: Path):
    (one, names), (two, others) = tissue(1), tissue(2, slides=3)
    folders = write(tmp_path / "a", one, names), write(tmp_path / "b", two, [f"other_{name}" for name in others])
    found = measured(*folders, weights=(3.0, 1.0))
    values = [pixels.reshape(-1, 3).astype(np.float64) / 255 for pixels in (one, two)]
    mean = 0.75 * values[0].mean(0) + 0.25 * values[1].mean(0)
    square = 0.75 * (values[0] ** 2).mean(0) + 0.25 * (values[1] ** 2).mean(0)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.std, np.sqrt(square - mean**2), atol=1e-12)
    assert found.slides == SLIDES + 3
    assert measured(*folders, weights=(3.0, 1.0), tiles=20).tiles == 20


def test_corrupt_tiles_are_counted_and_left_out(tmp_path: Path):
    pixels, slides = tissue(0)
    found = measured(write(tmp_path / "some", pixels, slides, corrupt=3))
    values = pixels[3:].reshape(-1, 3) / 255
    assert (found.tiles, found.corrupt) == (len(slides) - 3, 3)
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-12)
    with pytest.raises(ValueError, match="decoded"):
        measured(write(tmp_path / "all", pixels[:5], slides[:5], corrupt=5))


def test_one_slide_has_no_error_and_one_colour_no_deviation(tmp_path: Path):
    grey = np.full((4, SIDE, SIDE, 3), 51, np.uint8)
    found = measured(write(tmp_path / "grey", grey, ["a"] * 4))
    np.testing.assert_allclose(found.mean, 0.2)
    np.testing.assert_allclose(found.std, 0, atol=1e-8)
    assert np.isnan(found.mean_error).all() and np.isnan(found.std_error).all()


def test_the_printed_lines_are_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture):
    pixels, slides = tissue(0)
    folder, table = write(tmp_path / "tiles", pixels, slides), tmp_path / "figures.json"
    assert main([str(folder), "--tiles", "0", "--json", str(table), "--workers", "2"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    augmentation = load_config(tmp_path / "run.yaml").augmentation
    figures = json.loads(table.read_text())
    assert augmentation.normalize_mean == pytest.approx(figures["mean"], abs=5.1e-5)
    assert augmentation.normalize_std == pytest.approx(figures["std"], abs=5.1e-5)
    assert list(yaml.safe_load((tmp_path / "run.yaml").read_text())) == ["augmentation"]
    assert main([str(folder), "data.validation_fraction=0.4", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["slides"] < SLIDES
    assert main([str(tmp_path / "absent")]) == 2
    assert main([]) == 2


def test_tiles_that_are_drawn_without_end(train_slide: Path, tmp_path: Path):
    keys = [f"data.path={train_slide.parent}", "data.kind=slides", "online.mpp=[0.5]", "data.tile_size=64"]
    data = open_data(load_config(None, [*keys, f"online.cache_dir={tmp_path}"]))
    found = colour_statistics(data, tiles=70, workers=2)
    source, pixels = data.sources[0], []
    for group, rows in ((0, range(64)), (1, range(6))):  # the first 70, which a run would see first
        for row, (slide, stored) in zip(rows, source.read(group, rows), strict=True):
            pixels.append(source.decode(EncodedSample(0, group, row, slide, stored)))
    values = np.stack(pixels).reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, values.std(0), atol=1e-12)
    with pytest.raises(ValueError, match="without end"):
        colour_statistics(data, tiles=0)
