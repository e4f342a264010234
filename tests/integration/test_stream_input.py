"""The streams that a user can name: mixtures, the hub, exclusion; and what is wrong with them, in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.train.train import main
from prepatching_scripts.make_demo_slide import make_demo_slides
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import TINY, read_metrics, write_tissue_shards
from tests.integration.test_bad_input import errors, train

SHORT = ("optim.early_stop=0.5", "train.skip_checkpointer=true")  # two steps of eight samples


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second, smaller dataset."""
    return write_tissue_shards(tmp_path_factory.mktemp("frozen") / "shards", shards=2, rows=16)


def samples(output_dir: Path) -> list[tuple[int, int]]:
    """Row group and row of every consumed sample."""
    lines = (output_dir / "logs/samples.rank0.jsonl").read_text().splitlines()
    return [tuple(row) for line in lines for row in json.loads(line)["rows"]]


def test_a_mixture_takes_its_fractions_and_leaves_out_what_is_excluded(
    shards: Path, frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "excluded.txt").write_text("slide_1\nno such patient\n")
    mixture = f"train.datasets=[{{path: {shards}, weight: 3}}, {{path: {frozen}}}]"
    options = (mixture, f"train.exclusion_file={tmp_path / 'excluded.txt'}", "logging.samples=true")
    assert main(["--output-dir", str(tmp_path / "out"), *TINY, *options]) == 0
    logged = capsys.readouterr().err
    first = 12  # row groups of the first dataset, four per slide
    groups = np.array(samples(tmp_path / "out"))[:, 0]
    assert len(groups) == 64
    assert np.count_nonzero(groups < first) == 48
    assert not {4, 5, 6, 7, first + 2, first + 3} & set(groups.tolist())
    for line in (
        f"dataset '{shards}': 60 rows, 75.00% of the samples",
        f"dataset '{frozen}': training on 16 rows of 1 slides and 1 patients; excluded 16 rows of 1 slides",
        "1 of 2 names to exclude match no slide: no such patient",
    ):
        assert line in logged


def test_a_resumed_run_keeps_the_commit_of_the_hub(
    hub: HubServer, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.push("org/tissue", shards)
    assert train("org/tissue", tmp_path / "out", "optim.early_stop=1") == 0
    newer = shutil.copytree(shards, tmp_path / "newer")
    (newer / "shard-00001.parquet").unlink()
    hub.push("org/tissue", newer)
    before = hub.requests.copy()
    assert train("org/tissue", tmp_path / "out") == 0
    assert {hub.requests[kind] - before[kind] for kind in ("info", "tree")} == {0}
    capsys.readouterr()
    longer = ("optim.epochs=3", "train.allow_changes=true")
    assert train(newer, tmp_path / "out", *longer) == 2
    (error,) = errors(capsys)
    assert f"dataset '{newer}' changed since the checkpoint" in error
    assert train(shards, tmp_path / "out", *longer) == 0  # a local copy of the old commit will do


def test_what_is_wrong_with_a_hub_dataset(
    hub: HubServer, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.push("org/tissue", shards)
    hub.push("org/secret", shards)
    hub.tokens["org/secret"] = "hf_secret"
    (tmp_path / "text").mkdir()
    (tmp_path / "text/README.md").write_text("nothing here")
    hub.push("org/text", tmp_path / "text")
    cases = {
        ("org/nothing",): "there is no local path 'org/nothing', and",
        ("org/secret",): "or it is private and no token is set",
        ("org/text",): "holds no Parquet file",
        ("org/tissue", "train.streaming_dataset_revision=v9"): "has no revision 'v9'",
        ("hf://models/org/tissue",): "hf://datasets/org/name",
        (str(shards), "train.streaming_dataset_revision=v9"): "has no revisions",
        ("nosuch://place/x",): "nosuch",
    }
    for number, (arguments, message) in enumerate(cases.items()):
        assert train(arguments[0], tmp_path / f"out{number}", *arguments[1:]) == 2, arguments
        (error,) = errors(capsys)
        assert message in error and "hf_secret" not in error, arguments
        assert not (tmp_path / f"out{number}/metrics.jsonl").exists()


def test_tiles_cut_while_training_go_on_where_a_run_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_demo_slides(tmp_path / "slides")
    (tmp_path / "excluded.txt").write_text("demo_holdout\n")
    options = ("train.online_patching=true", f"online.slides={tmp_path / 'slides'}", "train.tile_size=64",
               "online.magnifications=[40,20,10]", f"online.cache_dir={tmp_path / 'cache'}",
               f"train.exclusion_file={tmp_path / 'excluded.txt'}")  # fmt: skip
    assert main(["--output-dir", str(tmp_path / "whole"), *TINY, *options]) == 0
    logged = capsys.readouterr().err
    assert "Data: tiles without end from 1 slides" in logged
    assert "training on 1 of 2 slides; 1 excluded, 0 kept for validation" in logged
    for stop in ("optim.early_stop=1", "optim.early_stop=2"):
        assert main(["--output-dir", str(tmp_path / "parts"), *TINY, *options, stop]) == 0
    losses = [[record["total_loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.online_patching=true", "data.path="], "data.path is empty"),
        (["train.online_patching=true", "online.slides=/nowhere"], "'/nowhere' does not exist"),
        (["train.online_patching=true", "online.slides=x", "online.mpp=[0.5,0.5]"], "not a list of different numbers"),
        (["train.online_patching=true", "online.slides=x", "online.mpp_weights=[1]"], "does not give each of"),
        (["train.online_patching=true", "online.slides=x", "online.slide_share=0"], "slide_share) = 0 is out of"),
        (["train.stream_lanes=91"], "data.lanes = 91 exceeds the 90 rows of the dataset"),
        (["train.stream_memory_gib=1.0e-6"], "and data.memory_gib = 1e-06; raise it"),
        (["train.exclusion_file=/nowhere.txt"], "/nowhere.txt"),
        (["train.validation_share=1.0"], "(given as train.validation_share) = 1.0 is out of range"),
        (["train.datasets=[{path: a}]"], "and data.datasets name different data; use one"),
        (["train.datasets=[{weight: 1}]", "train.streaming_dataset_path="], "data.datasets[0].path is empty"),
        (["train.augmentation_device=gpu"], "train.augmentation_device = 'gpu' is not available"),
    ],
)  # fmt: skip
def test_impossible_streams(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
) -> None:
    assert train(shards, tmp_path / "out", *overrides) == 2
    (error,) = errors(capsys)
    assert message in error


def test_schemas_that_cannot_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tables = {
        "data.image_column": pa.table({"picture": [b"x"]}),
        "binary is expected": pa.table({"jpeg": [[1, 2]]}),
        "holds 0 rows": pa.table({"jpeg": pa.array([], pa.binary())}),
    }
    for number, (message, table) in enumerate(tables.items()):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        pq.write_table(table, folder / "a.parquet")
        assert train(folder, tmp_path / f"out{number}") == 2
        (error,) = errors(capsys)
        assert message in error
