"""Descriptors against plain loops, and grey copies."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.descriptors import Descriptor, colour, flat_grey, pattern_codes, texture
from dinov2.eval.probe.__main__ import main


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_grey_copies_have_no_colour_and_a_flat_histogram(rng):
    image = rng.integers(0, 60, (51, 50, 3), dtype=np.uint8)  # dark, with many equal values
    flat = flat_grey(image)
    assert (flat == flat[..., :1]).all()
    np.testing.assert_array_equal(np.bincount(flat[..., 0].ravel(), minlength=256), [10] * 255 + [0])


def test_grey_copies_keep_the_order_of_grey_values_and_nothing_else():
    ramp = np.arange(240, dtype=np.uint8).reshape(15, 16)
    curved = (ramp.astype(float) ** 2 / 239).round().clip(0, 255)
    steep, plain = (np.repeat(x.astype(np.uint8)[..., None], 3, -1) for x in (curved[10:], ramp[10:]))
    np.testing.assert_array_equal(flat_grey(steep), flat_grey(plain))


def test_patterns_against_a_plain_loop(rng):
    grey = rng.integers(0, 8, (9, 7)).astype(np.uint8)
    clockwise = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    expected = np.zeros((7, 5), int)
    for y in range(1, 8):
        for x in range(1, 6):
            for bit, (dy, dx) in enumerate(clockwise):
                expected[y - 1, x - 1] += 2**bit * int(grey[y + dy, x + dx] >= grey[y, x])
    np.testing.assert_array_equal(pattern_codes(grey), expected)


def test_texture_is_two_histograms_of_a_tile(rng):
    image = np.repeat(rng.integers(0, 256, (12, 10, 1), dtype=np.uint8), 3, -1)
    found = texture(image)
    assert found.shape == (512,)
    np.testing.assert_allclose(found[:256], np.bincount(pattern_codes(image[..., 0]).ravel(), minlength=256) / 80)
    assert found[256:].sum() == pytest.approx(1)
    assert np.isclose(found[256:] * 12, np.round(found[256:] * 12)).all()  # (6 - 2) x (5 - 2) inner pixels of the half


def test_colour_is_mean_and_deviation():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    np.testing.assert_allclose(colour(image), [0.5] * 6)


def test_descriptors_stand_in_for_a_network(rng):
    tiles = rng.integers(0, 256, (3, 16, 18, 3), dtype=np.uint8)
    for name, describe in {"colour": colour, "lbp": texture}.items():
        found = Descriptor(name)(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255)
        np.testing.assert_allclose(found, np.stack([describe(tile) for tile in tiles]), rtol=1e-6)


def test_command_probes_descriptors_and_grey_copies(rng, tmp_path):
    """Two classes, told apart by colour alone, and two by texture alone."""
    for number in range(40):
        kind = ("plain", "striped")[number % 2]
        tile = np.tile(rng.integers(90, 130, (32, 32, 1), dtype=np.uint8), (1, 1, 3))
        if kind == "striped":
            tile[::2] += 20
        tile[..., 0] += 60 if number % 4 < 2 else 0
        for task, name in (("texture", kind), ("stain", "red" if number % 4 < 2 else "grey")):
            (tmp_path / task / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(tile).save(tmp_path / task / name / f"{number}.png")
    data = [f"{task}={tmp_path / task}" for task in ("texture", "stain")]
    options = ["--grey", "--probes", "logistic", "--image-size", "32", "--output", str(tmp_path / "out.csv")]
    for descriptor in ("colour", "lbp"):
        assert main(["--checkpoint", descriptor, "--data", *data, *options]) == 0
    with (tmp_path / "out.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "balanced_accuracy"]
    of_colour, of_texture = ({row["task"]: float(row["value"]) for row in part} for part in (rows[:4], rows[4:]))
    assert of_colour["stain"] == 1 and of_colour["stain_grey"] == 0.5  # nothing is left of it
    assert of_texture["texture"] > 0.9 and of_texture["texture_grey"] > 0.9
    assert of_texture["stain_grey"] < 0.8
