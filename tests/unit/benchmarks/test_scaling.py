"""The scaling page's arithmetic against hand calculation, and the page against the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import RECIPE, Network, main, tables, times, volume
from dinov2.configs import load_config

NET = Network(parameters=1_000_000, units=10, prototypes=1000)
STRATEGIES = ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD", "NO_SHARD")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_receives_nothing(strategy):
    assert volume(NET, 1, strategy).total == volume(NET, 1, strategy).network == 0
    assert times(NET, 1, strategy, 0.5, 450e9).exposed == 0


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "network"),
    [  # two nodes of 8: megabytes of 10^6 parameters
        ("SHARD_GRAD_OP", 4 * 15 / 16, 4 * 15 / 16, 8 / 2 / 8),
        ("FULL_SHARD", 6 * 15 / 16, 4 * 15 / 16, 10 / 2 / 8),
        ("HYBRID_SHARD", 4 * 7 / 8, 4 * 7 / 8 + 2 * (4 / 8) / 2, 2 * (4 / 8) / 2),
        ("NO_SHARD", 0, 8 * 15 / 16, 8 / 2 / 8),
    ],
)
def test_two_nodes_by_hand(strategy, weights, gradients, network):
    got = volume(NET, 16, strategy)
    assert got.weights / 1e6 == pytest.approx(weights)
    assert got.gradients / 1e6 == pytest.approx(gradients)
    sums = 3 * 2 * 4 * 1000
    assert got.sums == pytest.approx(sums * 15 / 16)
    assert got.network / 1e6 == pytest.approx(network + sums / 1e6 / 2 / 8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_node_uses_no_port(strategy):
    assert volume(NET, 8, strategy).network == 0
    assert times(NET, 8, strategy, 0.5, 450e9).network == 0


def test_what_the_step_cannot_hide_is_waited_for():
    free, short = (times(NET, 64, "FULL_SHARD", step, 450e9) for step in (0.5, 1e-9))
    assert free.exposed < short.exposed == pytest.approx(short.serial, rel=1e-3)
    assert free.serial == short.serial


def test_the_page_is_what_the_command_prints():
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    assert "\n".join(tables(load_config(RECIPE))) in page


def test_command(capsys):
    assert main(["--step-ms", "500"]) == 0
    printed = capsys.readouterr().out
    assert "takes 500 ms (measured)" in printed
    assert "| 512 |" in printed
