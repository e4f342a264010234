"""Features come in order, of every tile once, and leave the model and the random states alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.datasets.images import ImageFiles
from dinov2.eval.feature_extraction import Embedding, extract_features
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise

PLAIN = {"size": 14, "mean": (0, 0, 0), "std": (1 / 255,) * 3}


class Mean(torch.nn.Module):
    """Mean level of each image."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return x.mean((1, 2, 3))[:, None]


@pytest.fixture
def tiles(tmp_path):
    """Grey tiles 0, 10, ... 100 of unequal sizes."""
    for number in range(11):
        Image.fromarray(np.full((14 + number, 20, 3), 10 * number, np.uint8)).save(
            tmp_path / f"{number:02}.png"
        )
    return ImageFiles(tmp_path, [f"{number:02}.png" for number in range(11)])


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_every_tile_once_and_in_order(tiles, batch_size):
    model = Mean()
    features, kept = extract_features(model, tiles, Embedding(batch_size=batch_size, **PLAIN))
    np.testing.assert_allclose(features[:, 0], np.arange(0, 110, 10), atol=1e-3)
    assert features.dtype == np.float32 and kept.tolist() == list(range(11))
    assert set(model.shapes) == {(batch_size, 3, 14, 14)}


def test_class_token_and_mean_of_patches(tiles):
    model = randomise(DinoVisionTransformer(**SMALL, num_register_tokens=2)).eval()
    features, _ = extract_features(model, tiles, Embedding(pooling="cls_mean", size=56, batch_size=11))
    pixels = np.stack([np.full((3, 56, 56), 10 * n / 255, np.float32) for n in range(11)])
    x = (torch.from_numpy(pixels) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        tokens = model.get_intermediate_layers(x, n=1, return_class_token=True, norm=True)[0]
    expected = torch.cat([tokens[1], tokens[0].mean(1)], 1)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    cls, _ = extract_features(model, tiles, Embedding(size=56, batch_size=11))
    np.testing.assert_allclose(cls, features[:, :96], atol=1e-6)


def test_autocast(tiles):
    model = randomise(DinoVisionTransformer(**SMALL)).eval()
    exact, _ = extract_features(model, tiles, Embedding(size=56))
    half, _ = extract_features(model, tiles, Embedding(size=56, autocast=torch.bfloat16))
    assert half.dtype == np.float32 and 0 < np.abs(half - exact).max() < 0.2


def test_modes_and_random_states_are_left(tiles):
    model = randomise(DinoVisionTransformer(**SMALL, drop_path_rate=0.5)).train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    features, _ = extract_features(model, tiles, Embedding(size=56))
    again, _ = extract_features(model, tiles, Embedding(size=56))
    np.testing.assert_array_equal(features, again)  # no stochastic depth
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    np.testing.assert_array_equal(states[2], np.random.get_state()[1])
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


def test_damaged_tiles(tiles, caplog):
    (tiles.root / "03.png").write_bytes(b"no image")
    (tiles.root / "05.png").unlink()
    with pytest.raises(ValueError, match=r"Image '.*03.png' cannot be read"):
        extract_features(Mean(), tiles, Embedding(**PLAIN))
    features, kept = extract_features(Mean(), tiles, Embedding(**PLAIN), leave_out_damaged=True)
    assert kept.tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(features[:, 0], 10 * kept, atol=1e-3)
    assert "Left out 2 of 11 tiles: Image" in caplog.text


class NotANumber(Mean):
    """Breaks on tile 7."""

    def forward(self, x):
        return torch.where((super().forward(x) - 70).abs() < 1, torch.nan, 1.0)


def test_bad_input(tiles):
    with pytest.raises(ValueError, match=r"features of 1 tiles are not finite, those of .*07.png"):
        extract_features(NotANumber(), tiles, Embedding(**PLAIN))
    with pytest.raises(ValueError, match="no tiles to embed"):
        extract_features(Mean(), ImageFiles(tiles.root, []), Embedding())
    with pytest.raises(ValueError, match="Pooling 'mean' is none of cls, cls_mean"):
        Embedding(pooling="mean")
    with pytest.raises(ValueError, match="Batch size 0 and size 224 must both be at least 1"):
        Embedding(batch_size=0)
