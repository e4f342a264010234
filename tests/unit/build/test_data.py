"""What a run says about its stream, and how it keeps a commit."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov2.build import data as stream
from dinov2.configs import load_config
from dinov2.train.plan.plan import make_plan
from tests.helpers.runs import TINY, write_tissue_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "shards")


def described(shards: Path, *overrides: str) -> str:
    config = load_config(None, [*TINY, f"train.streaming_dataset_path={shards}", *overrides])
    plan, data = make_plan(config, 1), stream.open_data(config)
    return stream.describe_stream(config, plan, data, stream.order_parameters(config, plan, data))


def test_memory_of_batches_counts_every_one_in_flight(shards: Path) -> None:
    # Eight samples of 2 x 56 and 2 x 28 px; 60 x 40 batches are prepared and one is in use.
    gib = (60 * 40 + 1) * 8 * 3 * (2 * 56**2 + 2 * 28**2) / 2**30
    text = described(shards, "train.num_workers=60", "train.prefetch_factor=40")
    assert f"and {gib:.3g} GiB of batches on each process" in text
    assert "90 tiles, 0.711 passes, 8 lanes over 12 row groups of up to 8 rows" in text


def test_too_little_shared_memory_is_said(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "/dev/shm has" in described(shards, "train.num_workers=2")
    assert "/dev/shm" not in described(shards, "train.num_workers=0")


def test_a_commit_is_kept_only_for_an_unchanged_dataset(caplog: pytest.LogCaptureFixture) -> None:
    commit = "0123456789" * 4
    before = load_config(None, ["train.streaming_dataset_path=org/name"])
    saved = {
        "config": json.loads(json.dumps(dataclasses.asdict(before))),
        "places": [f"hf://datasets/org/name@{commit}"],
    }
    caplog.clear()
    assert stream._commits(before, saved) == [commit]
    assert not caplog.messages  # nothing is said anew of keys without effect
    assert stream._commits(before, None) == [""]
    for changed in ("train.streaming_dataset_path=data/copy", "train.streaming_dataset_revision=v2"):
        now = load_config(None, ["train.streaming_dataset_path=org/name", changed])
        assert stream._commits(now, saved) == [""]
    saved["places"] = ["/data/name@home"]
    assert stream._commits(before, saved) == [""]


def test_the_hub_without_a_token_is_read_with_half_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    hub = ("hf://datasets/org/name@main",)
    assert stream._is_anonymous(hub)
    assert not stream._is_anonymous(("s3://bucket/tiles",))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert not stream._is_anonymous(hub)
