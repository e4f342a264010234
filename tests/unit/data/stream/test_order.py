"""The order of samples against a slow reference, published hash values and frozen orders."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.stream.order import SampleOrder
from dinov2.utils.seeding import hash_words
from tests.helpers import slow_order

EDGES = {  # row group rows, lanes, block rows
    "uneven and empty row groups": ([5, 0, 1, 17, 0, 0, 8, 3], 4, 4),
    "more lanes than rows": ([3, 4, 2], 64, 4),
    "one lane": ([3, 4, 2], 1, 2),
    "one row": ([0, 1, 0], 5, 3),
    "one giant row group over many lanes": ([97], 10, 8),
    "blocks wider than row groups": ([6, 6, 6], 4, 1000),
    "blocks of one row": ([6, 6, 6], 4, 1),
}

# slow_order.epoch_order([3, 0, 4, 2], seed=7, lanes=2, block_rows=4, epoch=0), then epoch=1
FROZEN = [(3, 0), (2, 2), (3, 1), (0, 1), (2, 0), (0, 0), (2, 1), (0, 2), (2, 3)]
FROZEN += [(2, 3), (0, 2), (2, 0), (0, 1), (2, 1), (3, 0), (2, 2), (3, 1), (0, 0)]


def pairs(order: SampleOrder, indices: np.ndarray) -> list[tuple[int, int]]:
    locations = order.locate(indices)
    return list(zip(locations.group.tolist(), locations.row.tolist(), strict=True))


def assert_epoch_matches(group_rows: list[int], seed: int, lanes: int, block_rows: int, epoch: int) -> None:
    order = SampleOrder(group_rows, seed=seed, lanes=lanes, block_rows=block_rows)
    indices = np.arange(order.num_rows) + epoch * order.num_rows
    visited = pairs(order, indices)
    assert visited == slow_order.epoch_order(group_rows, seed, lanes, block_rows, epoch)
    assert sorted(visited) == [(group, row) for group, rows in enumerate(group_rows) for row in range(rows)]


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases_equal_the_slow_reference(case: str) -> None:
    group_rows, lanes, block_rows = EDGES[case]
    for epoch in (0, 1, 1000):
        assert_epoch_matches(group_rows, 11, lanes, block_rows, epoch)


@settings(max_examples=150, deadline=None)
@given(
    group_rows=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 2**64 - 1),
    lanes=st.integers(1, 90),
    block_rows=st.integers(1, 15),
    epoch=st.integers(0, 10**6),
)
def test_any_epoch_visits_each_row_once_as_the_slow_reference_does(
    group_rows: list[int], seed: int, lanes: int, block_rows: int, epoch: int
) -> None:
    assert_epoch_matches(group_rows, seed, lanes, block_rows, epoch)


@settings(max_examples=150, deadline=None)
@given(
    group_rows=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 90),
    block_rows=st.integers(1, 15),
    epoch=st.integers(0, 10**6),
)
def test_members_are_the_inverse_of_locate(group_rows: list[int], lanes: int, block_rows: int, epoch: int) -> None:
    order = SampleOrder(group_rows, seed=3, lanes=lanes, block_rows=block_rows)
    indices = np.arange(order.num_rows) + epoch * order.num_rows
    locations = np.stack(order.locate(indices), axis=1).tolist()
    located = dict(zip(indices.tolist(), locations, strict=True))
    listed = {}
    for key in {tuple(location[:3]) for location in located.values()}:
        members, rows = order.members(*key)
        assert listed.keys().isdisjoint(members.tolist())
        listed |= {g: [*key, row] for g, row in zip(members.tolist(), rows.tolist(), strict=True)}
    assert listed == located


def test_order_is_frozen() -> None:
    order = SampleOrder([3, 0, 4, 2], seed=7, lanes=2, block_rows=4)
    assert pairs(order, np.arange(18)) == FROZEN


def test_a_batch_over_several_epochs_and_out_of_order_equals_single_lookups() -> None:
    order = SampleOrder([4, 3, 2], seed=1, lanes=4, block_rows=2)
    indices = np.random.default_rng(0).integers(0, 60, 40)
    assert pairs(order, indices) == [pairs(order, np.array([g]))[0] for g in indices]


def test_seek_far_into_a_large_dataset_equals_the_reference_in_its_first_lane() -> None:
    group_rows = np.full(200_000, 64)
    order = SampleOrder(group_rows, seed=5, lanes=3072, block_rows=64)
    epoch = 7000
    first_group = min(range(len(group_rows)), key=hash_words(5, epoch, np.arange(200_000)).tolist().__getitem__)
    rows = sorted(range(64), key=lambda row: slow_order.key(5, epoch, first_group, row))
    indices = epoch * order.num_rows + np.arange(64) * 3072
    assert pairs(order, indices) == [(first_group, row) for row in rows]


def test_epochs_and_seeds_differ() -> None:
    orders = [SampleOrder([8] * 8, seed=seed, lanes=8, block_rows=8) for seed in (0, 1)]
    first, second = (pairs(orders[0], np.arange(64) + 64 * epoch) for epoch in (0, 1))
    assert first != second
    assert first != pairs(orders[1], np.arange(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_rows": [0, 0]}, "0 rows"),
        ({"seed": -1}, "seed is -1"),
        ({"lanes": 0}, "lanes is 0"),
        ({"block_rows": -3}, "block_rows is -3"),
    ],
)
def test_impossible_parameters_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(**{"group_rows": [4], "seed": 0, "lanes": 2, "block_rows": 2} | change)
