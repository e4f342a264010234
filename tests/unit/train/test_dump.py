"""The dump of a step that was not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.train.dump import RecentBatches, with_dump
from dinov2.train.update.guard import NonFiniteError

IMAGES, VALUES = 10, {"total_loss": math.inf, "ibot_loss": math.nan, "backbone": 3.5}


def batch(step: int) -> dict:
    pixels = torch.Generator().manual_seed(step)
    views = {f"{kind}_crops": (n * IMAGES, 3, s, s) for kind, n, s in (("global", 2, 16), ("local", 4, 8))}
    return {
        **{name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=pixels) for name, shape in views.items()},
        "indices": torch.arange(IMAGES) + IMAGES * (step - 1),
        "rows": [(step, row) for row in range(IMAGES)],
        "slides": ["a"] * IMAGES,
    }


def after(steps: int) -> RecentBatches:
    """The record of a run that went on from step 10 and took so many batches."""
    recent = RecentBatches((batch(step) for step in range(11, 11 + steps)), 10)
    assert sum(1 for _ in recent) == steps
    return recent


def error(step: int, ranks: tuple[int, ...] = (0,)) -> NonFiniteError:
    return NonFiniteError("not finite.", step, ranks, VALUES)


def test_what_is_written(tmp_path: Path):
    """The host looks three steps later, so that three batches more have been taken."""
    told = with_dump(error(17), after(10), tmp_path)
    folder = tmp_path / "dumps/step_17"
    assert str(folder) in str(told) and (told.step, told.ranks) == (17, (0,))
    described = json.loads((folder / "rank_0.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    expected = batch(17)
    assert described["values"] == {"total_loss": "inf", "ibot_loss": "nan", "backbone": 3.5}
    assert described["indices"] == expected["indices"].tolist()
    assert described["rows"] == [[17, row] for row in range(IMAGES)] and described["slides"] == expected["slides"]
    crops = {path.stem: np.asarray(Image.open(path)) for path in (folder / "rank_0").iterdir()}
    assert len(crops) == 8 * 4  # of the first eight images, two global and two local views
    np.testing.assert_array_equal(crops["162_global2"], expected["global_crops"][IMAGES + 2].permute(1, 2, 0))
    np.testing.assert_array_equal(crops["167_local1"], expected["local_crops"][7].permute(1, 2, 0))


def test_views_that_are_not_there(tmp_path: Path):
    recent = RecentBatches([batch(1) | {"local_crops": torch.empty(0)}], 0)
    list(recent)
    with_dump(error(1, ()), recent, tmp_path)  # of the gradient of all ranks
    assert len(list((tmp_path / "dumps/step_1/rank_0").iterdir())) == 8 * 2


@pytest.mark.parametrize("found", [error(12), error(17, (1,))], ids=["no longer kept", "of another rank"])
def test_nothing_to_write(tmp_path: Path, found: NonFiniteError):
    assert with_dump(found, after(10), tmp_path) is found
    assert not list(tmp_path.iterdir())


def test_a_dump_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "dumps").write_text("in the way")
    found = error(17)
    assert with_dump(found, after(10), tmp_path) is found
    assert caplog.records


def test_all_micro_batches_of_a_step(tmp_path: Path):
    """Two of each step; the step that the host looks at is three behind the newest, as without them."""
    recent = RecentBatches((batch(number) for number in range(1, 11)), 7, accumulation=2)
    list(recent)
    assert not recent.of_step(7) and not recent.of_step(13)
    with_dump(error(9), recent, tmp_path)
    described = json.loads((tmp_path / "dumps/step_9/rank_0.json").read_text())
    assert described["indices"] == [*range(20, 40)] and described["rows"][10] == [4, 0]
    names = {path.stem for path in (tmp_path / "dumps/step_9/rank_0").iterdir()}
    assert {"20_global1", "37_local2"} <= names and len(names) == 2 * 8 * 4
