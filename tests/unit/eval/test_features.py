"""Reading tiles and embedding them, with a model that hands its input through."""

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov2.data.parquet.source import ParquetSource
from dinov2.eval import embed_images, patch_feature_map, read_tiles


class Echo(torch.nn.Module):
    """Its CLS feature is the whole input, its patch features are the 14 px patches' pixels."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward_features(self, x):
        patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
        return {"x_norm_clstoken": x.flatten(1), "x_norm_patchtokens": patches}


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


def test_nothing_to_embed_is_an_error():
    with pytest.raises(ValueError, match="no images to embed"):
        embed_images(Echo(), [])


@pytest.fixture
def shard(tmp_path):
    """Ten grey tiles of levels 0, 10, ... 90, in row groups of four; the sixth row is damaged."""
    tiles = [np.full((14, 14, 3), 10 * i, np.uint8) for i in range(10)]
    data = [cv2.imencode(".png", tile)[1].tobytes() for tile in tiles]
    data[5] = b"no image"
    table = pa.table({"slide_path": ["a.svs"] * 10, "image_bytes": pa.array(data, pa.binary())})
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=4)
    return tmp_path


def levels(tiles):
    return [int(tile[0, 0, 0]) for tile in tiles]


def test_all_tiles_in_stored_order_without_the_damaged_one(shard, caplog):
    assert levels(read_tiles(ParquetSource(str(shard)))) == [0, 10, 20, 30, 40, 60, 70, 80, 90]
    assert "row 1 of row group 1" in caplog.text


@pytest.mark.parametrize(("limit", "expected"), [(3, [0, 30, 60]), (1, [0]), (10, None), (99, None)])
def test_a_limit_spreads_over_the_dataset(shard, limit, expected):
    expected = expected or [0, 10, 20, 30, 40, 60, 70, 80, 90]
    assert levels(read_tiles(ParquetSource(str(shard)), limit)) == expected


def test_a_dataset_can_be_embedded_by_its_path(shard):
    embedded = embed_images(Echo(), shard, size=14, mean=[0] * 3, std=[1 / 255] * 3)
    np.testing.assert_allclose(embedded[:, 0], [0, 10, 20, 30, 40, 60, 70, 80, 90], atol=1e-3)
