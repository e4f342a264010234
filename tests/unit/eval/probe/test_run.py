"""All probes together: on separable and random labels, by slide, without labels, and as metrics and files."""

import csv
import json
import math
import random
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from dinov2.configs.fields import key
from dinov2.eval import odcorr, rankme
from dinov2.eval.datasets.labels import LabelledTiles
from dinov2.eval.features import Embedding
from dinov2.eval.probe.__main__ import parse_args
from dinov2.eval.probe.nearest import Knn, knn_scores
from dinov2.eval.probe.options import Probing, options_for
from dinov2.eval.probe.results import COLUMNS, Result, append_csv, as_metrics, as_table, write_json
from dinov2.eval.probe.run import evaluate, run_probes
from dinov2.eval.probe.task import Fold, Probe
from dinov2.extensions import PROBES

WIDTH = 12
EMBEDDING = Embedding(size=2, batch_size=50, mean=(0, 0, 0), std=(1 / 255,) * 3)


class Pixels:
    """Tiles of 2 x 2 pixels, whose 12 levels are the features."""

    def __init__(self, features):
        self.features = features.astype(np.uint8)

    def __len__(self):
        return len(self.features)

    def read(self, index):
        return self.features[index].reshape(2, 2, 3)

    def name(self, index):
        return f"tile {index}"


class Flatten(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1) - 128


def made_up(count=400, signal=60, seed=0, **columns):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    direction = np.random.default_rng(9).choice([-1, 1], WIDTH)
    levels = 128 + signal * np.outer(2 * labels - 1, direction) + 20 * rng.normal(size=(count, WIDTH))
    return LabelledTiles(Pixels(levels.clip(0, 255)), labels, ("a", "b"), **columns)


QUICK = Probing(options=options_for(steps=600, runs=2, draws=20), resamples=200, folds=3)
SPLITS = {"splits": ("train",) * 200 + ("val",) * 50 + ("test",) * 150}


@pytest.mark.parametrize("columns", [{}, SPLITS], ids=["folds", "splits"])
def test_separable_labels(columns):
    results = run_probes(Flatten(), {"task": made_up(**columns)}, EMBEDDING, QUICK)
    found = {(r.probe, r.metric): r for r in results}
    probes = [f"knn{k}{variant}" for k in (5, 20) for variant in ("", "_majority", "_standardized")]
    probes += ["linear_eva", "linear_kaiko", "logistic", "few_shot1", "few_shot4", "few_shot16"]
    assert {probe for probe, _ in found} == {*probes, "rankme", "odcorr"}
    for probe in probes:
        result = found[probe, "balanced_accuracy"]
        # Heads are kept at the first of their best validations, some of them before they are sure of every tile.
        assert result.value > (0.95 if "linear" in probe else 0.99) and result.low <= result.value <= result.high
        assert result.count == (150 if columns else 400)
        assert result.division == ("split" if columns else "tile")
    assert found["linear_eva", "auroc"].value > 0.99
    assert found["linear_eva", "f1"].runs == (2 if columns else 6)
    assert found["logistic", "f1"].runs == (1 if columns else 3)


def test_random_labels():
    tiles = made_up(600, signal=0, seed=1)
    results = run_probes(Flatten(), {"task": tiles}, EMBEDDING, QUICK)
    for result in results:
        if result.metric == "balanced_accuracy":
            assert result.low - 0.03 < 0.5 < result.high + 0.03, result


def test_patients_never_help():
    """Labels and features follow the patient, not each other: with patients kept whole there is nothing to learn."""
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(60), 10)
    labels = rng.integers(0, 2, 60)[patients]
    levels = (rng.normal(128, 40, (60, WIDTH))[patients] + rng.normal(0, 3, (600, WIDTH))).clip(0, 255)
    tiles = LabelledTiles(Pixels(levels), labels, ("a", "b"), patients=tuple(map(str, patients)))
    knn5 = options_for(neighbours=(5,))
    quick = Probing(("knn",), knn5, resamples=200)
    by_patient = evaluate(Flatten(), {"task": tiles}, EMBEDDING, quick)
    by_tile = evaluate(Flatten(), {"task": tiles}, EMBEDDING, Probing(("knn",), knn5, resamples=200, group="tile"))
    key = "task/knn5/balanced_accuracy"
    assert by_tile[key] > 0.95
    assert by_patient[key] < 0.6
    width = [m[key + "_high"] - m[key + "_low"] for m in (by_patient, by_tile)]
    assert width[0] > 2 * width[1]  # patients, not tiles, are what is counted


@pytest.mark.parametrize("aggregation", ["features", "probabilities"])
def test_labels_per_slide(aggregation):
    rng = np.random.default_rng(3)
    slides = np.repeat(np.arange(60), rng.integers(3, 9, 60))
    labels = (np.arange(60) % 2)[slides]
    levels = 128 + 6 * np.outer(2 * labels - 1, np.ones(WIDTH)) + 20 * rng.normal(size=(len(slides), WIDTH))
    splits = tuple("test" if slide >= 40 else "train" for slide in slides)
    tiles = LabelledTiles(
        Pixels(levels), labels, ("a", "b"), slides=tuple(f"s{s:02}" for s in slides), splits=splits, per_slide=True
    )  # fmt: skip
    settings = Probing(("knn",), options_for(neighbours=(5,)), aggregation=aggregation, resamples=50)
    results = {r.metric: r for r in run_probes(Flatten(), {"task": tiles}, EMBEDDING, settings) if r.probe == "knn5"}
    features = levels.astype(np.uint8).astype(np.float32) - 128
    if aggregation == "features":
        rows = np.stack([features[slides == s].mean(0) for s in range(60)])
        row_slides = np.arange(60)
    else:
        rows, row_slides = features, slides
    fit, test = row_slides < 40, row_slides >= 40
    tensors = torch.from_numpy(rows[fit]), torch.from_numpy(row_slides[fit] % 2)
    (scores,) = knn_scores(Fold(0, tensors, tensors, torch.from_numpy(rows[test]), 2, tensors), 5).numpy()
    tested = row_slides[test]
    by_slide = np.stack([scores[tested == s].mean(0) for s in range(40, 60)])
    target = np.arange(40, 60) % 2
    assert results["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(target, by_slide.argmax(1)))
    assert results["auroc"].value == pytest.approx(roc_auc_score(target, by_slide[:, 1]))
    assert results["auroc"].count == 20


def test_without_labels():
    levels = np.random.default_rng(0).integers(0, 256, (300, WIDTH))
    metrics = evaluate(Flatten(), {"held_out": Pixels(levels)}, EMBEDDING)
    features = levels - 128.0
    assert metrics == {
        "held_out/rankme/value": pytest.approx(rankme(features), rel=1e-5),
        "held_out/odcorr/value": pytest.approx(odcorr(features), rel=1e-5),
    }


def test_label_free_figures_are_of_the_test_tiles():
    tiles = made_up(**SPLITS)
    metrics = evaluate(Flatten(), {"task": tiles}, EMBEDDING, Probing(("rankme",)))
    assert metrics == {"task/rankme/value": pytest.approx(rankme(tiles.images.features[250:] - 128.0), rel=1e-5)}


def test_same_seed_same_result_and_nothing_global_changes():
    model = Flatten().train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, again = (evaluate(model, {"task": made_up(120, 10)}, EMBEDDING, QUICK) for _ in range(2))
    assert first == again and model.training
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    np.testing.assert_array_equal(states[2], np.random.get_state()[1])
    other = evaluate(
        model, {"task": made_up(120, 10)}, EMBEDDING, Probing(("few_shot",), options_for(shots=(1,)), seed=1)
    )
    assert other["task/few_shot1/accuracy"] != first["task/few_shot1/accuracy"]


def test_shots_that_a_class_cannot_give_are_left_out(caplog):
    metrics = evaluate(
        Flatten(),
        {"task": made_up(20)},
        EMBEDDING,
        Probing(("few_shot",), options_for(shots=(1, 16)), folds=2),
    )
    assert {key.split("/")[1] for key in metrics} == {"few_shot1"}
    assert "Few-shot with [16] tiles per class is left out" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"probes": ("svm",)},
            "no probe 'svm'; known are knn, linear_eva, linear_kaiko, logistic, few_shot, rankme, odcorr",
        ),
        ({"aggregation": "max"}, "Aggregation 'max' is none of features, probabilities"),
        ({"group": "hospital"}, "Group 'hospital' is none of patient, slide, tile"),
        ({"folds": 1}, r"folds is 1; values in \[2, inf\) are accepted"),
        ({"options": {"knn": Knn.Options((5, 0))}}, r"neighbours is \(5, 0\); values in \[1, inf\)"),
        ({"limit": 0}, r"limit is 0; values in \[1, inf\)"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Probing(**settings)


def test_group_that_is_not_known():
    with pytest.raises(ValueError, match="Nothing tells the patient of a tile: labels need a column 'patient'"):
        evaluate(Flatten(), {"task": made_up()}, EMBEDDING, Probing(("knn",), group="patient"))


def test_metrics_csv_and_json(tmp_path):
    results = [
        Result("t", "knn5", "balanced_accuracy", 0.5, 0.25, 0.75, count=8),
        Result("t", "rankme", "value", 3.0),
    ]
    assert as_metrics(results) == {
        "t/knn5/balanced_accuracy": 0.5,
        "t/knn5/balanced_accuracy_low": 0.25,
        "t/knn5/balanced_accuracy_high": 0.75,
        "t/rankme/value": 3.0,
    }
    path = tmp_path / "eval" / "probes.csv"
    append_csv(path, results, 0)
    append_csv(path, results[:1], 100)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["probe"], row["low"]) for row in rows] == [
        ("0", "knn5", "0.25"), ("0", "rankme", ""), ("100", "knn5", "0.25"),
    ]  # fmt: skip
    assert tuple(rows[0]) == COLUMNS
    older = tmp_path / "older.csv"  # begun before there was the last column
    older.write_text(",".join(COLUMNS[:-1]) + "\n")
    append_csv(older, results, 5)
    assert {len(row) for row in csv.reader(older.open())} == {len(COLUMNS) - 1}
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv' is another table"):
        append_csv(other, results, 0)
    assert other.read_text() == "a,b\n1,2\n"
    write_json(tmp_path / "r.json", results, {"step": 7})
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["step"] == 7 and content["results"][1]["low"] is None
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "r.json", results, {})
    lines = as_table(results).splitlines()
    assert "0.2500 - 0.7500" in lines[1] and "3.0000" in lines[2] and len({len(line) for line in lines}) == 1
    assert math.isnan(results[1].low) and set(PROBES) >= {"rankme"}


class Length(Probe):
    """A probe of a file of its own: the mean length of the features, to a power."""

    needs_labels = False

    @dataclass(frozen=True)
    class Options:
        power: int = key(1, "of the length", least=1)

    def measure(self, task):
        lengths = np.linalg.norm(task.sample, axis=1) ** self.options.power
        return [Result(task.name, "length", "value", float(lengths.mean()), count=len(lengths))]


@pytest.fixture
def length(monkeypatch):
    """Registered as one line in `dinov2.extensions` does it."""
    module = ModuleType("a_probe")
    module.Length = Length
    monkeypatch.setitem(sys.modules, "a_probe", module)
    monkeypatch.setitem(PROBES._targets, "length", "a_probe:Length")


def test_a_registered_probe_needs_nothing_else(length, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (300, WIDTH))
    probing = Probing(("length", "knn"), options_for(power=2))
    results = run_probes(Flatten(), {"bare": Pixels(levels)}, EMBEDDING, probing)
    expected = np.square(levels - 128.0).sum(1).mean()
    assert as_metrics(results) == {"bare/length/value": pytest.approx(expected, rel=1e-5)}
    append_csv(tmp_path / "probes.csv", results, 3)
    assert "3,bare,length,value," in (tmp_path / "probes.csv").read_text()
    assert "length" in as_table(results)
    arguments = parse_args(["--checkpoint", "T", "--data", "D", "--probes", "length", "--power", "3"])
    assert (arguments.power, arguments.runs, arguments.shots) == (3, 5, (1, 4, 16))
    with pytest.raises(ValueError, match=r"power is 0; values in \[1, inf\)"):
        Probing(("length",), options_for(power=0))


def test_a_probe_that_fails_in_its_own_way_fails_the_run(length, monkeypatch):
    monkeypatch.setattr(Length, "measure", lambda self, task: [][0])
    with pytest.raises(IndexError):
        run_probes(Flatten(), {"task": made_up(20)}, EMBEDDING, Probing(("length",)))


def test_options_that_no_probe_has():
    with pytest.raises(TypeError, match="No probe has the option 'depth'; known are neighbours, runs, steps"):
        options_for(depth=3)
