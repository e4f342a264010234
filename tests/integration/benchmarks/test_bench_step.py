"""The step benchmark runs and refuses what it should; what it measures is not for tests."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, step_measure, step_variants
from benchmarks.gate import GateResult
from benchmarks.step_batches import PRESETS, host_batches
from benchmarks.step_calibration import calibrate, token_shapes
from benchmarks.step_measure import measure
from benchmarks.step_phases import around_forward, time_phases
from tests.helpers.batches import random_batch
from tests.helpers.fp8 import scaled_mm

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = PRESETS["tiny"]
# What an installation of PyTorch brings, and omegaconf with its own needs.
ALLOWED = "torch torchgen functorch triton nvidia cuda numpy omegaconf yaml antlr4 attr typing_extensions sympy"
ALLOWED += " mpmath networkx jinja2 markupsafe filelock fsspec setuptools pkg_resources dinov2 benchmarks"
HIDING = f"""
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        allowed = top.startswith("_") or top in sys.stdlib_module_names or top in {ALLOWED.split()}
        return self.finder.find_spec(name, path, target) if allowed else None

sys.meta_path[:] = map(Hide, sys.meta_path)
"""


def measured(name: str, **options) -> dict:
    stages: list[dict] = []
    measure(name, TINY, CPU, **{"steps": None, "brief": False, "save": stages.append, **options})
    return json.loads(json.dumps(stages[-1], allow_nan=False))


@pytest.mark.parametrize("name", ["ours_bf16", "ours_eager", "ours_fp8", "ref_packed", "ref_sep"])
def test_implementation_agrees_with_the_reference_and_is_measured(name, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    result = measured(name)
    assert result["status"] == "measured"
    assert result["gate"]["passed"]
    assert result["timing"]["images"] == (2 if name == "ref_sep" else 4)
    assert result["timing"]["img_per_s"] > 0
    assert all(math.isfinite(loss) for loss in result["losses"].values())
    assert {"warm_up", "recompiled", "memory", "predicted_gib", "work"} <= result.keys()
    assert result["work"]["dense_tflop"] > result["work"]["model_tflop"] > 0
    if name.startswith("ours"):
        assert list(result["phases"]["ms"]) == [
            "data_wait",
            "h2d_and_normalise",
            "begin",
            "teacher_backbone",
            "teacher_heads_and_targets",
            "student_backbone",
            "student_heads_and_losses",
            "backward",
            "clip_optimizer_ema",
        ]


def test_gate_sees_a_wrong_term(monkeypatch):
    spec_of = step_variants.step_spec
    monkeypatch.setattr(step_variants, "step_spec", lambda *x: dataclasses.replace(spec_of(*x), kde_kappa=4.0))
    result = measured("ours_bf16")
    assert result["status"] == "failed"
    assert result["gate"]["loss_errors"]["kde_loss"] > 0.02


def test_what_fails_the_gate_is_not_timed(monkeypatch):
    wrong = GateResult({"total_loss": 0.0}, {"backbone": 0.5}, {"backbone": 0.0}, "backbone.norm.bias", 0.4, 1, 0.99, 1)
    monkeypatch.setattr(step_measure, "check", lambda *_: wrong)
    result = measured("ours_bf16")
    assert result["status"] == "failed"
    assert "cosine of the gradients of backbone is 0.5" in result["error"]
    assert "timing" not in result


def test_command_needs_torch_numpy_and_omegaconf_only(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    output = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/bench_step.py", "--preset", "tiny", "--device", "cpu"]
    command += ["--impl", "ours_bf16", "--no-calibration", "--steps", "1", "--json", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    hidden = subprocess.run([sys.executable, "-c", "import PIL"], env=environment, capture_output=True, text=True)
    assert "No module named 'PIL'" in hidden.stderr
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(output.read_text())
    assert results["complete"]
    assert results["implementations"]["ours_bf16"]["status"] == "measured"
    assert {"cpu", "gpu", "versions", "commit", "cuda", "driver"} <= results["machine"].keys()


def test_calibration():
    result = calibrate(TINY, CPU)
    floor = result["floor"]
    assert {len(times) for times in result["linears"].values()} == {4}
    assert result["linears"].keys() == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert all("math" in backends for backends in result["attention"].values())
    parts = ("block_products_ms", "attention_ms", "other_products_ms", "update_ms")
    assert all(floor[part] > 0 for part in parts)
    assert floor["total_ms"] == pytest.approx(sum(floor[part] for part in parts))


def test_shapes_of_the_full_recipe():
    # floor(0.6 * 96) and floor(0.6 * 384) images are kept, of 256 + 5 and 49 + 5 tokens.
    shapes = token_shapes(PRESETS["vitg48"].config())
    assert shapes == {"student": ((57, 261), (230, 54)), "teacher": ((96, 261),)}
    assert sum(images * tokens for images, tokens in shapes["student"]) == 27_297


def test_batches_are_like_those_of_training():
    config = TINY.config()
    expected, batches = random_batch(config, 4), host_batches(config, 4, CPU)
    first, second = next(batches), next(batches)
    for name in (
        "global_crops",
        "local_crops",
        "masks",
        "mask_indices",
        "mask_weight",
        "n_masked",
        "slide_ids",
    ):
        assert first[name].shape == expected[name].shape, name
    assert first["global_crops"].dtype == torch.uint8
    assert not torch.equal(first["global_crops"], second["global_crops"])
    masked = int(first["n_masked"])
    assert 0 < masked <= len(first["mask_indices"])
    assert first["masks"].flatten().nonzero().flatten().tolist() == first["mask_indices"][:masked].tolist()
    assert not first["mask_weight"][masked:].any()
    # The weights of a masked crop's patches sum to 1, and half of the 8 crops are masked.
    assert first["mask_weight"].sum().item() == pytest.approx(4)


def test_passes_of_a_module_end_phases():
    marks, module = [], torch.nn.Identity()
    with around_forward(module, marks.append, "before", "inside"):
        module(1)
        module(2)
    module(3)
    assert marks == ["before", "inside", "inside", "inside"]


def test_phases_are_means_over_steps():
    def staged_step(mark):
        mark("one")
        mark("two")

    phases = time_phases(staged_step, 3, step_ms=1e9, device=CPU)
    assert phases["ms"].keys() == {"one", "two"}
    assert phases["sum_ms"] == pytest.approx(sum(phases["ms"].values()))
    assert not phases["sums_to_step"]


def test_order_has_ours_at_both_ends():
    labels = [label for label, _ in bench_step.schedule(["ref_packed", "ours_bf16"], ["compile"])]
    assert labels == ["ours_bf16", "ref_packed", "ours_bf16-compile", "ours_bf16_again"]
    assert bench_step.schedule(["ours_bf16"], []) == [("ours_bf16", "ours_bf16")]
    assert bench_step.schedule(["ref_sep"], []) == [("ref_sep", "ref_sep")]


def test_comparisons():
    def timed(speed, ms):
        return {"timing": {"img_per_s": speed, "step_ms": ms}}

    outcomes = {"ours_bf16": timed(90.0, 500.0), "ref_packed": timed(45.0, 1000.0)}
    outcomes |= {
        "ours_bf16-compile": timed(75.0, 620.0),
        "ours_bf16_again": timed(81.0, 550.0),
        "ref_sep": {},
    }
    found = bench_step.comparisons({"implementations": outcomes, "calibration": {"floor": {"img_per_s": 120.0}}})
    assert found["ratios"]["ours_bf16"] == {"vs_ref_packed": 2.0, "fraction_of_floor": 0.75}
    assert found["drift"] == pytest.approx(-0.1)
    assert found["ablation"] == {"compile": {"predicted_ms": (20.0, 100.0), "measured_ms": 120.0}}


def test_a_part_that_hangs_or_fails_costs_no_other(tmp_path, monkeypatch):
    outcomes = iter([{"status": "failed", "error": "exit status 1\nOutOfMemoryError"}, {"status": "measured"}])
    seen = []

    def run_child(*arguments):
        seen.append(json.loads(output.read_text())["implementations"].keys() if output.exists() else None)
        return next(outcomes)

    output = tmp_path / "out.json"
    monkeypatch.setattr(bench_step, "run_child", run_child)
    arguments = ["--preset", "tiny", "--device", "cpu", "--no-calibration", "--json", str(output)]
    assert bench_step.main([*arguments, "--impl", "ref_packed,ref_sep"]) == 1
    assert seen == [None, {"ref_packed"}]
    parts = json.loads(output.read_text())["implementations"].values()
    assert [part["status"] for part in parts] == [
        "failed",
        "measured",
    ]


def test_a_part_is_stopped_at_its_limit(tmp_path):
    args = bench_step.parse(["--preset", "tiny", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    outcome = bench_step.run_child("ours_bf16", args, 0.05, tmp_path, dict(os.environ), False)
    assert outcome["status"] == "failed"
    assert outcome["error"].startswith("stopped after")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "there.json"], "there.json exists"),
        (["--json", "nowhere/new.json"], "nowhere is no folder"),
        (["--json", "new.json", "--impl", "ours_bf61"], "ours_bf61 is unknown"),
        (["--json", "new.json", "--ablate", "compilation"], "compilation is unknown"),
        (["--json", "new.json", "--steps", "0"], "--steps is 0"),
        ([], "--json is missing"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("{}")
    with pytest.raises(SystemExit):
        bench_step.main(["--preset", "tiny", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
    assert Path("there.json").read_text() == "{}"
