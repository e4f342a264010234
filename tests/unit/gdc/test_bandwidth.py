"""Bytes by the clock."""

import random
import threading

import pytest

from prepatching_scripts.gdc.bandwidth import Bandwidth
from tests.unit.gdc.conftest import Clock


def test_bandwidth_by_the_clock():
    clock, taken, generator = Clock(), 0, random.Random(0)
    bandwidth = Bandwidth(1000.0, burst_s=0.5, clock=lambda: clock.now, sleep=clock.sleep)
    for _ in range(300):
        clock.now += generator.choice([0.0, 0.0, 0.01, 3.0])  # time that the bytes take, now and then a pause
        before, piece = clock.now, generator.randrange(1, 400)
        bandwidth.take(piece)
        taken += piece
        assert taken <= 1000.0 * (clock.now - 100.0 + 0.5) + 1e-6
        assert clock.now - before <= piece / 1000.0 + 1e-9  # never waits for more than what came
    clock.now, start = clock.now + 1e6, clock.now + 1e6
    for _ in range(10):
        bandwidth.take(1000)
    assert clock.now - start == pytest.approx(9.5)  # a long pause saves up only the burst


def test_bandwidth_is_shared_by_threads():
    waits: list[float] = []
    bandwidth = Bandwidth(100.0, burst_s=0.0, clock=lambda: 0.0, sleep=waits.append)
    threads = [
        threading.Thread(target=lambda: [bandwidth.take(10) for _ in range(50)], daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([0.1 * (i + 1) for i in range(200)])
    with pytest.raises(ValueError, match="lets nothing pass"):
        Bandwidth(0.0)
