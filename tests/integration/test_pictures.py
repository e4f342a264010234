"""Pictures and teachers that sinks get at each export, and a training that does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinov2.logging.sinks import Exported
from dinov2.train.train import main
from tests.helpers.runs import TINY, checkpoint_tensors
from tests.helpers.toys import Album

SEEN = Album.seen
SINK = f"logging.sinks=['{Album.__module__}:{Album.__name__}']"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def train(shards: Path):
    def run(output_dir: Path, *overrides: str) -> int:
        data = (f"data.path={shards}", "evaluation.eval_period_iterations=3")
        return main(["--output-dir", str(output_dir), *TINY, *data, *overrides])

    return run


def test_each_export_has_its_pictures(train, tmp_path: Path):
    assert train(tmp_path / "plain", "optim.early_stop=1") == 0
    assert train(tmp_path / "shown", SINK, "logging.upload_teacher=true", "optim.early_stop=1") == 0
    assert [exported.step for exported in SEEN] == [3, 4]
    assert [sorted(exported.pictures) for exported in SEEN] == [["crops", "patch_features"], ["patch_features"]]
    assert all(png.startswith(PNG) for exported in SEEN for png in exported.pictures.values())
    assert all(exported.teacher.is_file() and f"_{exported.step}/" in str(exported.teacher) for exported in SEEN)
    expected, found = (checkpoint_tensors(tmp_path / name, 4) for name in ("plain", "shown"))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_pictures_can_be_left_out(train, tmp_path: Path):
    assert train(tmp_path / "run", SINK, "logging.pictures=false", "optim.early_stop=0.75") == 0
    assert [Exported(3)] == SEEN


def test_what_cannot_be_drawn_stops_nothing(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("dinov2.report.figures.draw_pca", fails)
    assert train(tmp_path / "run", SINK, "optim.early_stop=0.75") == 0
    assert [sorted(exported.pictures) for exported in SEEN] == [["crops"]]
