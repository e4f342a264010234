"""The plan in words against arithmetic by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import dinov2
from dinov2.configs import load_config
from dinov2.train.plan.describe import describe_plan, hours_of
from dinov2.train.plan.gpus import find_gpu, seen_gpu
from dinov2.train.plan.measure import Cost, StepFlops
from dinov2.train.plan.plan import make_plan
from dinov2.train.ssl_meta_arch import SSLMetaArch

RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"
GIB = 2**30


def described(
    *overrides: str, gpu: object = find_gpu("H200"), price: float | None = None, processes: int = 8
) -> dict[str, list[str]]:
    """Lines of the plan by the word they begin with, those that continue one with it."""
    config = load_config(RECIPE, overrides)
    costs = SimpleNamespace(
        frozen_teachers=[],
        saved_teachers=[],
        config=config,
        compiled=True,
        student=SSLMetaArch(config, weights_device="meta").student,
        flops=lambda images: StepFlops(250 * 10**12, 245 * 10**12, 377 * 10**12),
        activations=lambda images: Cost(saved=images * 66 * GIB // 48, peak=GIB + images * 66 * GIB // 48),
    )
    lines: dict[str, list[str]] = {}
    for line in describe_plan(config, make_plan(config, processes), costs, gpu, price=price).splitlines():
        if start := re.match(r"  (peak lr|\w+)", line):
            lines.setdefault(word := start[1], [])
        elif not line.startswith(" "):
            lines.setdefault(word := line.split()[0].strip(","), [])
        lines[word].append(line)
    return lines


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?", line)]


def test_hours_by_hand():
    """250,000 steps of 249.2 TFLOP at 989.4 TFLOP/s: 62.97 Ms of the peak are 17.49 h."""
    hoped, published = hours_of(250_000, 249.2e12, 989.4e12)
    assert hoped == pytest.approx(34.98, abs=0.01)
    assert published == pytest.approx(72.88, abs=0.01)


def test_a_range_of_time_and_cost():
    text = described(price=2.5)
    seconds = [250e12 / (fraction * 989.4e12) for fraction in (0.5, 0.24)]
    assert numbers(text["time"][0])[:2] == pytest.approx([1e3 * s for s in seconds], rel=5e-3)
    assert numbers(text["time"][0])[2:4] == pytest.approx([384 / s for s in seconds], rel=5e-3)
    hours = [250_000 * s / 3600 for s in seconds]
    length = numbers(text["length"][0])
    assert length[:2] == pytest.approx(hours, rel=5e-3)
    assert length[2:] == pytest.approx([12_500, *(hour / 20 for hour in hours)], rel=5e-3)  # of 20 exports the first
    cost = numbers(text["cost"][0])
    assert cost[:2] == pytest.approx([8 * hour for hour in hours], rel=5e-3)
    assert cost[2:] == pytest.approx([*(20 * hour for hour in hours), 2.5], rel=5e-3)
    assert len(numbers(described()["cost"][0])) == 2  # no price, no money


def test_micro_batches_take_time_one_after_the_other():
    text = described("optim.accumulation_steps=3")
    assert numbers(text["batch"][0]) == [1152, 8, 48, 3]
    assert numbers(text["compute"][0])[:2] == [750, 735]
    assert numbers(text["time"][0])[0] == pytest.approx(3e3 * 250e12 / (0.5 * 989.4e12), rel=5e-3)


def test_schedules_of_section_schedules_are_shown():
    rate = "schedules.lr={start: 0, peak: 1e-3, end: 1e-4, warmup_epochs: 4}", "optim.scaling_rule=none"
    text = described(*rate, "schedules.teacher_temp={start: 0.03, peak: 0.06, warmup_epochs: 8}")
    assert numbers(text["warm"][0] if "warm" in text else text["warm-up"][0])[:2] == [5000, 10_000]
    assert numbers(text["peak lr"][0]) == [1e-3]


def test_a_run_that_ends_before_its_first_export():
    text = described("optim.early_stop=1")
    assert numbers(text["length"][0])[2] == 1250


@pytest.mark.parametrize(("dtype", "peak"), [("bf16", 165.2e12), ("fp32", 82.6e12)])
def test_the_peak_of_the_dtype(dtype: str, peak: float):
    text = described(f"precision={dtype}", gpu=find_gpu("RTX 4090"))
    assert numbers(text["time"][0])[0] == pytest.approx(1e3 * 250e12 / (0.5 * peak), rel=1e-3)


def test_memory_is_that_of_the_gpu():
    assert numbers(described(gpu=seen_gpu("NVIDIA H200", 140 * GIB))["memory"][0])[1] == 140
    assert "warning" not in described()
    small = described(gpu=find_gpu("RTX 4090"))
    assert numbers(small["memory"][0])[1] == 23 and len(small["warning"]) == 1
    assert "RTX 4090" in small["Predicted"][0]


def test_a_gpu_without_peaks_has_memory_and_no_hours():
    text = described(gpu=seen_gpu("NVIDIA GeForce GTX 1080", 100 * GIB), price=2.0)
    assert numbers(text["memory"][0])[1] == 100
    assert text.keys() & {"length", "cost"} == set()


def test_a_run_on_a_cpu_is_not_predicted():
    assert described(gpu=None).keys() & {"Predicted", "memory", "time", "length", "cost"} == set()


def test_schedules_by_hand():
    """The recipe's warm-up is 10 epochs of 1,250 steps, the temperature's 30; cosines span 8,000 of which 200 run."""
    text = described()["schedules"]
    table = {line[12:31].strip(): [float(cell.replace(",", "")) for cell in line[31:].split()] for line in text}
    assert table["step"] == [1, 12_500, 37_500, 250_000]
    peak = 2e-4 * math.sqrt(384 / 1024)
    done = (249_999 - 12_500) / (10_000_000 - 12_500)
    end = 1e-6 + (peak - 1e-6) / 2 * (1 + math.cos(math.pi * done))
    config = load_config(RECIPE)
    assert config.optim.min_lr == 1e-6
    assert table["learning rate"][0] == 0
    assert [table["learning rate"][i] for i in (1, 3)] == pytest.approx([peak, end], rel=1e-3)
    ramp = 0.04 + 0.03 * 12_499 / 37_499
    assert table["teacher temperature"] == pytest.approx([0.04, ramp, 0.07, 0.07], abs=1e-5)
    done = 249_999 / 10_000_000
    final = 1 - 0.006 / 2 * (1 + math.cos(math.pi * done))
    assert [table["teacher momentum"][i] for i in (0, 3)] == pytest.approx([0.994, final], abs=1e-6)
    decay = 0.2 + (0.04 - 0.2) / 2 * (1 + math.cos(math.pi * done))
    assert [table["weight decay"][i] for i in (0, 3)] == pytest.approx([0.04, decay], rel=1e-3)


def test_a_run_of_one_step_has_one_column():
    text = described("optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.early_stop=null")["schedules"]
    assert text[0].split()[2:] == ["1"]
