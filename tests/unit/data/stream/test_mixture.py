"""Mixtures: fractions, exactly-once, resumption, and the parts' own orders against the slow reference."""

import math
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.source import EncodedSample
from dinov2.data.stream.derived import MixedSource, make_source
from dinov2.data.stream.memory import Prefetch
from dinov2.data.stream.mixture import (
    MixedOrder,
    describe_fractions,
    divide_lanes,
    make_order,
    spread,
)
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from tests.helpers import slow_order
from tests.helpers.memory_source import MemorySource

GROUP_ROWS = [[4, 4, 3, 0, 8, 1, 16], [2, 5], [9, 0, 7, 7]]
WEIGHTS = [3, 1, 2]
SEED, LANES, BLOCK, BATCH = 5, 24, 4, 12

datasets = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), min_size=1, max_size=4)


def mixed_order(group_rows: Sequence[Sequence[int]] = GROUP_ROWS, weights: Sequence[float] = WEIGHTS, **changes):
    return MixedOrder(group_rows, weights, **{"seed": SEED, "lanes": LANES, "block_rows": BLOCK} | changes)


def own_order(group_rows: Sequence[int], seed: int, lanes: int, block_rows: int) -> Iterator[tuple[int, int]]:
    epoch = 0
    while True:
        yield from slow_order.epoch_order(group_rows, seed, lanes, block_rows, epoch)
        epoch += 1


def slow_mixture(
    group_rows: Sequence[Sequence[int]], lanes: Sequence[int], seed: int, block_rows: int, samples: int
) -> list[tuple[int, int, int]]:
    """(dataset, row group, row) of the first samples, drawn from each dataset's own endless order in turn."""
    own = [own_order(rows, slow_order.key(seed, d), lanes[d], block_rows) for d, rows in enumerate(group_rows)]
    return [(d, *next(own[d])) for d in islice(cycle(spread(lanes).tolist()), samples)]


def located(order: MixedOrder, indices: Sequence[int]) -> list[tuple[int, int, int]]:
    locations = order.locate(np.array(indices))
    firsts = [first for first, _ in order.parts]
    part = np.searchsorted(firsts, locations.group, side="right") - 1
    group = locations.group - np.array(firsts)[part]
    return list(zip(part.tolist(), group.tolist(), locations.row.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(counts=st.lists(st.one_of(st.integers(1, 6), st.integers(1, 150)), min_size=1, max_size=12))
def test_slots_hold_every_dataset_in_proportion_from_the_start_on(counts: list[int]) -> None:
    slots, total = spread(counts), sum(counts)
    assert Counter(slots.tolist()) == dict(enumerate(counts))
    for d, count in enumerate(counts):
        for t, held in enumerate(np.cumsum(slots == d).tolist(), 1):
            exact = Fraction(count * t, total)
            assert math.floor(exact) <= held <= math.ceil(exact)


def test_slots_are_frozen() -> None:
    assert spread([3, 1]).tolist() == [0, 0, 0, 1]
    assert spread([2, 2, 1]).tolist() == [0, 1, 0, 1, 2]
    assert spread([1] * 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("weights", "lanes", "expected"),
    [
        ([3, 1], 8, [6, 2]),
        ([0.75, 0.25], 8, [6, 2]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([2, 3, 5], 7, [1, 2, 4]),  # 1.4, 2.1 and 3.5
        ([1000, 1], 8, [7, 1]),
        ([1, 1000, 1], 4, [1, 2, 1]),
        (
            [1, 9, 90],
            10,
            [1, 1, 8],
        ),  # 0.1 takes a lane of 10, whereupon 9 / 99 of the rest is less than one too
        ([5e-324, 1.7e308, 1.7e308], 9, [1, 4, 4]),
        ([7], 5, [5]),
        ([0.1] * 10, 10, [1] * 10),
    ],
)
def test_lanes_by_largest_remainder(weights: list[float], lanes: int, expected: list[int]) -> None:
    assert divide_lanes(weights, lanes) == expected


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    spare=st.integers(0, 5000),
)
def test_lanes_are_all_given_and_near_their_fraction(weights: list[float], spare: int) -> None:
    lanes = len(weights) + spare
    counts = divide_lanes(weights, lanes)
    assert sum(counts) == lanes
    assert min(counts) >= 1
    assert divide_lanes([weight * 2**40 for weight in weights], lanes) == counts
    fractions = [Fraction(weight) * lanes / sum(map(Fraction, weights)) for weight in weights]
    if min(fractions) >= 1:
        assert all(abs(count - fraction) < 1 for count, fraction in zip(counts, fractions, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    group_rows=datasets,
    weights=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    lanes=st.integers(4, 40),
    block_rows=st.integers(1, 10),
)
def test_samples_are_those_of_each_datasets_own_order(
    group_rows: list[list[int]], weights: list[int], seed: int, lanes: int, block_rows: int
) -> None:
    weights = weights[: len(group_rows)]
    order = mixed_order(group_rows, weights, seed=seed, lanes=lanes, block_rows=block_rows)
    own_lanes = divide_lanes(weights, lanes)
    expected = slow_mixture(group_rows, own_lanes, seed, block_rows, 120)
    assert located(order, range(120)) == expected
    shuffled = np.random.default_rng(0).permutation(120)
    assert located(order, shuffled) == [expected[g] for g in shuffled]


@settings(max_examples=60, deadline=None)
@given(group_rows=datasets, lanes=st.integers(4, 40), start=st.integers(0, 10**6))
def test_members_are_the_inverse_of_locate(group_rows: list[list[int]], lanes: int, start: int) -> None:
    order = mixed_order(group_rows, range(1, len(group_rows) + 1), lanes=lanes)
    indices = np.arange(start, start + 80)
    locations = np.stack(order.locate(indices), axis=1)
    listed = {}
    for key in np.unique(locations[:, :3], axis=0).tolist():
        members, rows = order.members(*key)
        assert np.stack(order.locate(members), axis=1).tolist() == [[*key, row] for row in rows.tolist()]
        listed |= {g: [*key, row] for g, row in zip(members.tolist(), rows.tolist(), strict=True)}
    assert {g: listed[g] for g in indices.tolist()} == dict(zip(indices.tolist(), locations.tolist(), strict=True))


def test_each_dataset_visits_its_rows_once_in_each_of_its_epochs() -> None:
    order = mixed_order()
    visited: list[list[tuple[int, int]]] = [[], [], []]
    for d, group, row in located(order, range(2000)):
        visited[d].append((group, row))
    assert [len(rows) for rows in visited] == pytest.approx([1000, 2000 / 6, 2000 / 3], abs=2)
    for group_rows, rows in zip(GROUP_ROWS, visited, strict=True):
        size = sum(group_rows)
        everything = [(group, row) for group, count in enumerate(group_rows) for row in range(count)]
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert all(sorted(epoch) == everything for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_any_stretch_of_samples_holds_the_fractions() -> None:
    order = mixed_order([[500]] * 5, [50, 30, 15, 4, 1], lanes=400)
    part = np.array([d for d, _, _ in located(order, range(1200))])
    for d, fraction in enumerate([0.5, 0.3, 0.15, 0.04, 0.01]):
        before = np.concatenate([[0], np.cumsum(part == d)])
        for length in (10, 48, 100, 399):
            held = before[length:] - before[:-length]
            assert np.all(np.abs(held - fraction * length) < 2)


def test_equal_datasets_are_ordered_apart() -> None:
    rows = {0: [], 1: []}
    for d, group, row in located(mixed_order([[9, 9], [9, 9]], [1, 1]), range(36)):
        rows[d].append((group, row))
    assert rows[0] != rows[1]


def test_a_single_dataset_has_the_plain_order_whatever_its_weight() -> None:
    source = MemorySource([["a"] * 4, ["b"] * 3])
    order = make_order([source], [0.3], seed=1, lanes=4, block_rows=2)
    assert isinstance(order, SampleOrder)
    assert order.parameters == {"seed": 1, "lanes": 4, "block_rows": 2}
    assert order.parts == [(0, order)]
    assert make_source([source]) is source


def test_parameters_tell_fractions_apart_and_ignore_a_common_factor() -> None:
    parameters = mixed_order().parameters
    assert parameters == {"seed": 5, "lanes": 24, "block_rows": 4, "dataset_lanes": [12, 4, 8]}
    assert mixed_order(weights=[6, 2, 4]).parameters == parameters
    assert mixed_order(weights=[3, 1, 3]).parameters != parameters


def test_fractions_are_told() -> None:
    assert describe_fractions(mixed_order(), ["dx", "frozen", "more"]) == [
        "dataset 'dx': 36 rows, 50.00% of the samples (12 of 24 lanes)",
        "dataset 'frozen': 7 rows, 16.67% of the samples (4 of 24 lanes)",
        "dataset 'more': 23 rows, 33.33% of the samples (8 of 24 lanes)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1, 0, 1]}, "weight is 0; a positive finite number"),
        ({"weights": [1, -2.5, 1]}, "weight is -2.5"),
        ({"weights": [1, math.inf, 1]}, "weight is inf"),
        ({"weights": [1, math.nan, 1]}, "weight is nan"),
        ({"weights": [1, 1]}, "2 weights are given for 3 datasets"),
        ({"lanes": 2}, "3 datasets needs as many lanes, but the order has 2"),
        ({"lanes": 0}, "lanes is 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"block_rows": 0}, "block_rows is 0"),
        ({"group_rows": [[3], [0, 0], [1]]}, "dataset 2 of 3 in a mixture holds 0 rows"),
        ({"group_rows": [[3], [], [1]]}, "dataset 2 of 3 in a mixture holds 0 rows"),
    ],
)
def test_impossible_mixtures_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_order(**change)


def test_a_single_datasets_weight_is_checked_too() -> None:
    with pytest.raises(ValueError, match="weight is -1"):
        make_order([MemorySource([["a"]])], [-1], seed=0, lanes=1, block_rows=1)


def memory_sources(group_rows: Sequence[Sequence[int]] = GROUP_ROWS) -> list[MemorySource]:
    return [
        MemorySource([[f"{name}{group}"] * rows for group, rows in enumerate(groups)], name)
        for name, groups in zip("abc", group_rows, strict=True)
    ]


def test_source_hands_every_call_to_the_dataset_of_the_group() -> None:
    parts = memory_sources()
    source = pickle.loads(pickle.dumps(make_source(parts)))
    assert source.group_rows.tolist() == [4, 4, 3, 0, 8, 1, 16, 2, 5, 9, 0, 7, 7]
    assert source.group_bytes.tolist() == [1000 * rows for rows in source.group_rows]
    assert source.num_rows == 66
    assert source.read(6, [15]) == [("a6", b"a:6:15")]
    assert source.read(7, [1, 0]) == [("b0", b"b:0:1"), ("b0", b"b:0:0")]
    assert source.read(12, [6]) == [("c3", b"c:3:6")]
    assert source.decode(EncodedSample(0, 12, 6, "c3", b"c:3:6")).tolist() == [[[3, 6, 0]]]
    assert source.slides(8) == ["b1"] * 5
    assert source.describe(8) == "row group 1 of b"
    assert source.describe(8, 3) == "row 3 of row group 1 of b"
    assert not source.is_remote
    parts[1].is_remote = True
    assert make_source(parts).is_remote


def test_source_is_identified_by_its_datasets_in_their_order() -> None:
    a, b, c = memory_sources()
    fingerprint = MixedSource([a, b, c]).fingerprint
    assert MixedSource(memory_sources()).fingerprint == fingerprint
    others = [MixedSource(parts).fingerprint for parts in ([b, a, c], [a, b], [a, b, b], [a, b, c, c])]
    assert len({fingerprint, *others}) == 5


def steps(world: int, start: int, count: int) -> list[EncodedSample]:
    sources = memory_sources()
    order = make_order(sources, WEIGHTS, seed=SEED, lanes=LANES, block_rows=BLOCK)
    ranks = [
        RankReader(make_source(sources), order, global_batch=BATCH, rank=rank, world_size=world, start_sample=start)
        for rank in range(world)
    ]
    return [sample for step in islice(zip(*ranks, strict=True), count) for part in step for sample in part]


def test_readers_of_any_ranks_give_the_same_stream_and_resume_without_a_gap() -> None:
    reference = slow_mixture(GROUP_ROWS, [12, 4, 8], SEED, BLOCK, 40 * BATCH)
    data = [b"%s:%d:%d" % (b"abc"[d : d + 1], group, row) for d, group, row in reference]
    for world in (1, 2, 4):
        assert [sample.data for sample in steps(world, 0, 40)] == data
    resumed, start = [], 0
    for world, count in [(2, 7), (4, 1), (1, 13), (3, 19)]:
        resumed += steps(world, start * BATCH, count)
        start += count
    assert [sample.index for sample in resumed] == list(range(40 * BATCH))
    assert [sample.data for sample in resumed] == data


def test_aligned_lanes_are_fetched_once_by_one_rank() -> None:
    # 9 and 3 lanes of 16 rows each, so that a lane begins with a row group and both datasets' epochs take 16 steps
    sources = [MemorySource([["s"] * 4] * groups, row_bytes=1) for groups in (36, 12)]
    order = make_order(sources, [3, 1], seed=SEED, lanes=12, block_rows=BLOCK)
    for rank in range(4):
        split = {"global_batch": 12, "rank": rank, "world_size": 4, "start_sample": 0}
        reader = RankReader(make_source(sources), order, **split, prefetch=Prefetch(look_ahead=0))
        assert len(list(islice(reader, 16))) == 16
    assert [Counter(source.reads) for source in sources] == [Counter(range(36)), Counter(range(12))]
