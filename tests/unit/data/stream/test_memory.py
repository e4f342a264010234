"""How lanes are chosen from the memory that their row groups take."""

import logging

import numpy as np
import pytest

from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.data.stream.order import SampleOrder


class SizedSource:
    """Row groups of equal rows and bytes."""

    def __init__(self, groups: int, rows: int, group_bytes: int, is_remote: bool = False) -> None:
        self.group_rows = np.full(groups, rows)
        self.group_bytes = np.full(groups, group_bytes)
        self.is_remote = is_remote


def lanes_for(source: SizedSource, lanes: int = 0, batch: int = 384, world: int = 8, limit: float = 16) -> int:
    def make_order(number: int) -> SampleOrder:
        return SampleOrder(source.group_rows, seed=0, lanes=number, block_rows=64)

    return fit_lanes(make_order, source, lanes=lanes, global_batch=batch, world_size=world, limit_gib=limit)


def test_small_row_groups_give_eight_lanes_per_sample_of_the_batch() -> None:
    assert lanes_for(SizedSource(40_000, 64, 64 * 105_000)) == 3072


def test_the_published_layout_fits_eight_processes_with_a_lane_per_sample(caplog) -> None:
    # 12,000 row groups of 2,417 PNG tiles of 105 kB: 48 lanes of 254 MB each on one process.
    giant = SizedSource(12_000, 2417, 2417 * 105_000)
    with caplog.at_level(logging.WARNING):
        assert lanes_for(giant) == 384
    assert "reading 3072 lanes side by side would hold up to 9" in caplog.text
    order = SampleOrder(giant.group_rows, seed=0, lanes=384, block_rows=64)
    bound = memory_bound(giant, order, global_batch=384, world_size=8, prefetch=Prefetch())
    held, ahead, reading = 48 * 2417 * 105_000, 105_000 * (9 * 48 + 48), 4 * 2 * 2417 * 105_000
    assert bound == held + ahead + reading


def test_below_the_batch_size_lanes_are_a_fraction_of_it(caplog) -> None:
    giant = SizedSource(12_000, 2417, 2417 * 105_000)
    assert lanes_for(giant, batch=48, world=1, limit=8) == 24


def test_what_cannot_fit_is_refused_with_the_figures() -> None:
    giant = SizedSource(100, 2417, 4 * GIB)
    with pytest.raises(ValueError, match=r"up to 4 GiB take 3.\.. GiB on each process even with 3 lanes"):
        lanes_for(giant, limit=16)
    with pytest.raises(ValueError, match=r"even with 384 lanes, and data.memory_gib = 16"):
        lanes_for(giant, lanes=384)


def test_lanes_asked_for_are_taken_or_refused() -> None:
    small = SizedSource(10, 10, 1000)
    assert lanes_for(small, lanes=100) == 100
    with pytest.raises(ValueError, match=r"data.lanes = 101 exceeds the 100 rows of the dataset"):
        lanes_for(small, lanes=101)


@pytest.mark.parametrize(("rows", "batch", "expected"), [(3071, 384, 1536), (9, 16, 8), (1, 16, 1), (2, 6, 1)])
def test_a_tiny_dataset_has_no_more_lanes_than_rows(rows: int, batch: int, expected: int) -> None:
    assert lanes_for(SizedSource(rows, 1, 1000), batch=batch, world=1) == expected


def test_no_more_lanes_than_row_groups_lest_neighbours_share_one() -> None:
    assert lanes_for(SizedSource(40, 64, 64_000), batch=16, world=1) == 32
    assert lanes_for(SizedSource(2, 1000, 1_000_000), batch=48, world=1) == 3  # 1/16 of the batch, and odd


def test_a_network_is_read_by_more_threads_as_far_as_memory_allows() -> None:
    assert Prefetch.suited_to(SizedSource(10, 64, 64 * 30_000), 16 * GIB) == Prefetch(4, 8)
    assert Prefetch.suited_to(SizedSource(10, 64, 64 * 30_000, is_remote=True), 16 * GIB) == Prefetch(16, 32)
    assert Prefetch.suited_to(SizedSource(10, 2417, GIB // 4, is_remote=True), 16 * GIB) == Prefetch(4, 32)
    assert Prefetch.suited_to(SizedSource(10, 2417, 9 * GIB, is_remote=True), 16 * GIB) == Prefetch(1, 32)
