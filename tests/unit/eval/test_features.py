"""Tiles are read, squared and embedded in order, of every tile once; the model and the random states are left alone."""

import random

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov2.data.parquet.source import ParquetSource
from dinov2.eval import attention_maps, embed_images, patch_feature_map, read_tiles
from dinov2.eval.datasets.images import ImageFiles
from dinov2.eval.features import Embedding, embed_tiles, extract_features
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise

PLAIN = {"size": 14, "mean": (0, 0, 0), "std": (1 / 255,) * 3}


class Echo(torch.nn.Module):
    """Its CLS feature is the whole input, its patch features are the 14 px patches' pixels."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, is_training=False):
        patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
        return {"x_norm_patchtokens": patches} if is_training else x.flatten(1)


def random_images(count, height, width):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def test_embedding_normalises_as_torchvision_does():
    images = random_images(5, 28, 28)
    expected = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])]
    )
    embedded = embed_images(Echo(), images, size=28, batch_size=2, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3])
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(embedded, torch.stack([expected(i).flatten() for i in images]), atol=1e-5)


def test_embedding_resizes_the_centred_square_as_pillow_does():
    (image,) = random_images(1, 40, 64)
    pillow = Image.fromarray(image[:, 12:52]).resize((28, 28), Image.Resampling.BICUBIC)
    embedded = embed_images(Echo(), [image], size=28, mean=[0] * 3, std=[1] * 3)
    difference = 255 * embedded - np.asarray(pillow, np.float32).transpose(2, 0, 1).reshape(1, -1)
    assert np.abs(difference).max() < 1.01


def test_patch_features_lie_where_their_patches_do():
    (image,) = random_images(1, 28, 28)
    maps = patch_feature_map(Echo(), [image], size=28, mean=[0] * 3, std=[1] * 3)
    lower_left = image[14:, :14].transpose(2, 0, 1).reshape(-1) / 255
    np.testing.assert_allclose(maps[0, 1, 0], lower_left, atol=1e-6)


def test_attention_is_that_of_torch_and_lies_where_its_patches_do():
    model = randomise(DinoVisionTransformer(**SMALL, num_register_tokens=2)).eval()
    last = model.blocks[-1].attn
    reference = torch.nn.MultiheadAttention(SMALL["embed_dim"], SMALL["num_heads"], batch_first=True)
    reference.in_proj_weight.data, reference.in_proj_bias.data = last.qkv.weight.data, last.qkv.bias.data
    entered = []
    hook = last.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    mixed = last.qkv.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    maps = attention_maps(model, random_images(2, 56, 56), size=56)
    hook.remove()
    mixed.remove()
    tokens = entered[-1].reshape(2, 3 + 16, -1)
    _, expected = reference(tokens, tokens, tokens, need_weights=True)
    assert maps.shape == (2, 3, 4, 4) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.reshape(2, 3, 16), expected[:, :3, 3:].detach(), rtol=1e-4, atol=1e-6)
    assert not last.qkv._forward_hooks


def test_attention_of_what_has_none_is_an_error():
    with pytest.raises(ValueError, match="Echo"):
        attention_maps(Echo(), random_images(1, 28, 28), size=28)


def test_nothing_to_embed_is_an_error():
    with pytest.raises(ValueError, match="no images to embed"):
        embed_images(Echo(), [])


@pytest.fixture
def shard(tmp_path):
    """Ten grey tiles of levels 0, 10, ... 90, in row groups of four; the sixth row is corrupt."""
    tiles = [np.full((14, 14, 3), 10 * i, np.uint8) for i in range(10)]
    data = [cv2.imencode(".png", tile)[1].tobytes() for tile in tiles]
    data[5] = b"no image"
    table = pa.table({"slide_path": ["a.svs"] * 10, "image_bytes": pa.array(data, pa.binary())})
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=4)
    return tmp_path


def levels(tiles):
    return [int(tile[0, 0, 0]) for tile in tiles]


def test_all_tiles_in_stored_order_without_the_corrupt_one(shard, caplog):
    assert levels(read_tiles(ParquetSource(str(shard)))) == [0, 10, 20, 30, 40, 60, 70, 80, 90]
    assert "row 1 of row group 1" in caplog.text


@pytest.mark.parametrize(("limit", "expected"), [(3, [0, 30, 60]), (1, [0]), (10, None), (99, None)])
def test_a_limit_spreads_over_the_dataset(shard, limit, expected):
    expected = expected or [0, 10, 20, 30, 40, 60, 70, 80, 90]
    assert levels(read_tiles(ParquetSource(str(shard)), limit)) == expected


def test_a_dataset_can_be_embedded_by_its_path(shard):
    embedded = embed_images(Echo(), shard, size=14, mean=[0] * 3, std=[1 / 255] * 3)
    np.testing.assert_allclose(embedded[:, 0], [0, 10, 20, 30, 40, 60, 70, 80, 90], atol=1e-3)


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
        Image.fromarray(np.full((14 + number, 20, 3), 10 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
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


def test_corrupt_tiles(tiles, caplog):
    (tiles.root / "03.png").write_bytes(b"no image")
    (tiles.root / "05.png").unlink()
    with pytest.raises(ValueError, match=r"Image '.*03.png' cannot be read"):
        extract_features(Mean(), tiles, Embedding(**PLAIN))
    features, kept = extract_features(Mean(), tiles, Embedding(**PLAIN), skip_corrupt=True)
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


def test_tiles_of_several_shapes_keep_their_order():
    tiles = [np.full((14 * (1 + n % 2), 14, 3), 10 * n, np.uint8) for n in range(7)]
    features = embed_tiles(Mean(), tiles, Embedding(**PLAIN))
    np.testing.assert_allclose(features[:, 0], np.arange(0, 70, 10), atol=1e-3)
