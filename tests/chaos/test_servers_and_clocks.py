"""A hub that does not answer for a while or for good, and a clock that is set while a run goes on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.train.train import main
from tests.helpers.hub_server import Fault, HubServer
from tests.helpers.launches import LAUNCHED, assert_equal_runs
from tests.helpers.runs import TINY

FAILURES = [Fault("503"), Fault("drop")]


def train(data: Path | str, output_dir: Path, *overrides: str) -> int:
    return main(["--output-dir", str(output_dir), *TINY, *LAUNCHED, f"data.path={data}", *overrides])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train(data, output_dir) == 0
    return output_dir


@pytest.fixture
def hub(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.push("org/tissue", data)
        yield server


def outage(seconds: float) -> Iterator[Fault]:
    """Failures of one kind and another, for so long after the first request."""
    until = time.monotonic() + seconds
    for number in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count()):
        yield FAILURES[number % 2]


@pytest.mark.slow
def test_a_hub_that_is_down_for_20_seconds(hub: HubServer, whole: Path, tmp_path: Path):
    output_dir = tmp_path / "out"
    assert train("org/tissue", output_dir, "optim.early_stop=3") == 0
    hub.faults, begun = outage(20), time.monotonic()
    assert train("org/tissue", output_dir) == 0
    assert time.monotonic() - begun > 20
    assert_equal_runs(whole, output_dir)


@pytest.mark.slow
def test_a_hub_that_is_down_for_longer_than_is_tolerated(
    hub: HubServer, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Ten minutes for the five that are tolerated, a hundred times as fast; then the same command goes on."""
    output_dir = tmp_path / "out"
    assert train("org/tissue", output_dir, "optim.early_stop=3") == 0
    hub.faults = outage(6)
    status, said = train("org/tissue", output_dir, "data.outage_minutes=0.05"), capsys.readouterr().err
    assert status == 2 and "Traceback" not in said, said
    hub.faults = ()
    assert train("org/tissue", output_dir) == 0
    assert_equal_runs(whole, output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("jump_s", [-86_400.0, -30.0, 30.0, 86_400.0, 10 * 365 * 86_400.0])
def test_a_clock_that_is_set(data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float):
    output_dir, now, calls = tmp_path / "out", time.time, itertools.count()
    assert train(data, output_dir, "optim.early_stop=3") == 0
    monkeypatch.setattr(time, "time", lambda: now() + (jump_s if next(calls) > 60 else 0.0))
    assert train(data, output_dir, "train.hang_timeout=20", "train.time_limit=5") == 0
    assert next(calls) > 120  # it was looked at before and after
    assert_equal_runs(whole, output_dir)
