"""Features and probe results of three ranks, whole or sharded backbones, are bit for bit those of one process."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.fsdp import fully_shard

from dinov2.eval.datasets.labels import open_labelled_tiles
from dinov2.eval.features import Embedding, extract_features
from dinov2.eval.probe.options import Probing, options_for
from dinov2.eval.probe.results import as_metrics
from dinov2.eval.probe.run import evaluate, run_probes
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise
from tests.helpers.spawn import run_ranks

EMBEDDING, LARGER = (Embedding(size=size, batch_size=4) for size in (56, 84))
OPTIONS = options_for(neighbours=(3,), shots=(2,), draws=3, runs=2, steps=20)
PROBING = Probing(options=OPTIONS, folds=2, resamples=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """29 noise tiles of two classes, 15 and 14: eight batches of four, the last one short."""
    root = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for number in range(29):
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (56, 70, 3), np.uint8)).save(path)
    return root


def backbone():
    torch.manual_seed(0)
    return randomise(DinoVisionTransformer(**SMALL)).eval()


def features_and_results(rank, root, shard):
    model, tiles = backbone(), open_labelled_tiles(root)
    if shard:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    features, kept = extract_features(model, tiles.images, EMBEDDING)
    return features, kept, as_metrics(run_probes(model, {"task": tiles}, EMBEDDING, PROBING, (model, LARGER)))


def error_of(action, *args):
    try:
        action(*args)
    except ValueError as error:
        return str(error)


def results_and_errors(rank, root, corrupt):
    """The results of a whole and a sharded backbone; what a corrupt tile and a task that is too small lead to."""
    images, tiles = open_labelled_tiles(corrupt).images, open_labelled_tiles(root)
    return [
        features_and_results(rank, root, False),
        features_and_results(rank, root, True),
        error_of(extract_features, backbone(), images, EMBEDDING),
        error_of(evaluate, backbone(), {"task": tiles}, EMBEDDING, Probing(folds=40)),
    ]


def assert_same(result, expected):
    np.testing.assert_array_equal(result[0], expected[0])
    np.testing.assert_array_equal(result[1], expected[1])
    assert result[2] == expected[2]


def test_ranks_equal_one_process_and_hear_of_errors(folder, tmp_path):
    corrupt = Path(shutil.copytree(folder, tmp_path / "corrupt"))
    (corrupt / "b" / "07.png").write_bytes(b"no image")
    expected = features_and_results(0, folder, False)
    assert len(expected[0]) == len(np.unique(expected[0], axis=0)) == 29
    for plain, sharded, unreadable, too_small in run_ranks(results_and_errors, folder, corrupt, world_size=3):
        assert_same(plain, expected)
        assert_same(sharded, expected)
        assert "07.png' cannot be read" in unreadable
        assert too_small == "29 groups cannot be divided into 40 folds; 2 to 15 are possible."
