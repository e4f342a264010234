"""Means and spreads of a sweep's runs, from folders as trainings leave them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dinov2.sweep.launch import FINISHED
from dinov2.sweep.plan import Sweep, read
from dinov2.sweep.results import TABLE, VALUES, spread, write_results

RECORDS = 40


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "sweep.yaml"
    file.write_text("base: vits14_reg4\nvariants: {a: {optim.clip_grad: 1.0}, b.c: {}}\nseeds: [0, 1, 2]\n")
    return read(str(file), tmp_path / "out", ["data.path=x"])


def train(sweep: Sweep, name: str, level: float, is_finished: bool = True, probe: float | None = None) -> None:
    """Leave what a training leaves: losses that fall to a level, and a probe."""
    folder = sweep.output / name
    folder.mkdir(parents=True)
    records = [{"step": step, "total_loss": level + (RECORDS - step)} for step in range(1, RECORDS + 1)]
    if probe is not None:
        records += [
            {"step": step, "bach/knn/balanced_accuracy": value}
            for step, value in ((RECORDS // 2, 0.1), (RECORDS, probe))
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if is_finished:
        (folder / FINISHED).write_text("{}")


def test_the_table_counts_finished_runs_and_the_page_shows_all(sweep: Sweep):
    for seed, probe in enumerate((0.5, 0.6, 0.8)):
        train(sweep, f"a-seed{seed}", seed, probe=probe)
    train(sweep, "b.c-seed0", 10.0)
    train(sweep, "b.c-seed1", 1000.0, is_finished=False)
    page = write_results(sweep).read_text()
    assert all(run.name in page for run in sweep.runs[:5]) and "b.c-seed2" in page
    found = {one["name"]: one for one in json.loads((sweep.output / VALUES).read_text())["variants"]}
    assert found["a"]["results"]["bach/knn"]["mean"] == pytest.approx(np.mean([0.5, 0.6, 0.8]))
    assert found["a"]["results"]["bach/knn"]["sd"] == pytest.approx(np.std([0.5, 0.6, 0.8], ddof=1))
    # The last tenth are steps 37 to 40: 3, 2, 1 and 0 above the level.
    assert found["a"]["results"]["total_loss"]["seeds"] == pytest.approx({"0": 1.5, "1": 2.5, "2": 3.5})
    assert found["b.c"]["runs"] == ["b.c-seed0"]
    assert found["b.c"]["results"]["total_loss"] == {"mean": 11.5, "sd": None, "seeds": {"0": 11.5}}
    table = (sweep.output / TABLE).read_text()
    assert "| 3 of 3 | 1 of 3 |" in table and "| 0.6333 ± 0.1528 |  |" in table


def test_before_the_first_run_there_is_a_page_all_the_same(sweep: Sweep):
    assert write_results(sweep).exists()
    assert "| 0 of 3 | 0 of 3 |" in (sweep.output / TABLE).read_text()


def test_spread_is_that_of_finite_values():
    assert spread([1.0, math.nan, 3.0]) == pytest.approx((2.0, 2**0.5))
    assert spread([4.0])[0] == 4.0 and math.isnan(spread([4.0])[1])
    assert all(map(math.isnan, spread([math.nan])))
