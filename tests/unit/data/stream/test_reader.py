"""The reader of each rank: what it hands out, how often it fetches, how much it holds, how it ends."""

import gc
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dinov2.data.storage.retry import Retries
from dinov2.data.stream.memory import Prefetch, memory_bound
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from tests.helpers import slow_order

GROUP_ROWS = [4, 4, 3, 0, 8, 1, 16, 4, 2, 30]
ROW_BYTES = 1000


class MemorySource:
    """Rows that name themselves; counts reads and the rows that are alive."""

    is_remote = False

    def __init__(self, group_rows: list[int], broken: int | None = None) -> None:
        self.group_rows = np.array(group_rows)
        self.group_bytes = self.group_rows * ROW_BYTES
        self.num_rows = sum(group_rows)
        self.broken = broken
        self.reads: Counter[int] = Counter()

    def read(self, group: int, rows: list[int]) -> list[tuple[str, bytes]]:
        if group == self.broken:
            raise RuntimeError(f"row group {group} is gone")
        self.reads[group] += 1
        return [(f"slide{group}", b"%d:%d" % (group, row)) for row in rows]


def reader(source: MemorySource, lanes: int, batch: int, rank: int = 0, world: int = 1, start: int = 0, **options):
    order = SampleOrder(source.group_rows, seed=2, lanes=lanes, block_rows=4)
    return RankReader(source, order, global_batch=batch, rank=rank, world_size=world, start_sample=start, **options)


def expected(lanes: int, epochs: int) -> list[tuple[int, int]]:
    orders = [slow_order.epoch_order(GROUP_ROWS, 2, lanes, 4, epoch) for epoch in range(epochs)]
    return [location for order in orders for location in order]


@pytest.mark.parametrize(
    ("lanes", "batch", "start"),
    [(24, 12, 0), (12, 12, 24), (7, 12, 12), (5000, 12, 60), (30, 12, 36), (24, 12, 5), (3, 240, 0)],
    ids=["V=2B", "V=B", "V<B", "V>N", "V%B", "start within a batch", "B>N"],
)
def test_steps_of_all_ranks_joined_are_the_order(lanes: int, batch: int, start: int) -> None:
    steps = 15
    reference = expected(lanes, 60)[start : start + steps * batch]
    for world in (1, 3, 4):
        ranks = [reader(MemorySource(GROUP_ROWS), lanes, batch, rank, world, start) for rank in range(world)]
        joined = [sample for step in islice(zip(*ranks, strict=True), steps) for part in step for sample in part]
        assert [sample.index for sample in joined] == list(range(start, start + steps * batch))
        assert [(sample.group, sample.row) for sample in joined] == reference
        assert all(sample.data == b"%d:%d" % (sample.group, sample.row) for sample in joined)
        assert all(sample.slide == f"slide{sample.group}" for sample in joined)


def test_aligned_lanes_are_fetched_once_by_one_rank() -> None:
    group_rows = [6] * 48  # 12 lanes of 24 rows; a lane begins with a row group and covers 4
    sources = [MemorySource(group_rows) for _ in range(4)]
    for rank, source in enumerate(sources):
        for _ in islice(reader(source, 12, 12, rank, 4, prefetch=Prefetch(look_ahead=0)), 24):
            pass
    assert sum((source.reads for source in sources), Counter()) == Counter(range(48))


def test_giant_groups_are_fetched_once_per_epoch_and_again_where_a_lane_runs_into_them() -> None:
    source = MemorySource([500, 500])  # 80 lanes of 13 or 12 rows: the second row group begins within a lane
    for _ in islice(reader(source, 80, 40, prefetch=Prefetch(look_ahead=0)), 25):
        pass
    assert sorted(source.reads.values()) == [1, 2]


@pytest.mark.parametrize(("lanes", "batch"), [(24, 12), (30, 12), (7, 12), (3, 240), (5000, 12)])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_are_freed_as_used_and_stay_within_the_bound(lanes: int, batch: int, world: int) -> None:
    source, prefetch = MemorySource(GROUP_ROWS), Prefetch(threads=1, look_ahead=2)
    steps = iter(reader(source, lanes, batch, world - 1, world, 17, prefetch=prefetch))
    most = 0
    for _ in range(30):
        last = next(steps)[-1].index
        held = [future.result() for future in steps.gi_frame.f_locals["fetches"].values()]
        assert all(held)
        assert min(g for samples in held for g in samples) > last
        most = max(most, sum(map(len, held)))
    order = SampleOrder(source.group_rows, seed=2, lanes=lanes, block_rows=4)
    bound = memory_bound(source, order, global_batch=batch, world_size=world, prefetch=prefetch)
    assert 0 < most * ROW_BYTES <= bound


def reader_threads() -> int:
    """The readers' own: other threads of the process come and go."""
    return sum(thread.name.startswith("dinov2-reader") for thread in threading.enumerate())


def test_threads_start_with_the_first_step_and_end_with_the_iterator() -> None:
    before = reader_threads()
    steps = iter(reader(MemorySource(GROUP_ROWS), 24, 12))
    assert reader_threads() == before
    next(steps)
    assert reader_threads() > before
    del steps
    gc.collect()
    assert reader_threads() == before


def test_a_thread_that_waits_to_try_a_server_again_does_not_hold_up_the_end() -> None:
    tried = threading.Event()

    def overloaded() -> None:
        tried.set()
        raise TimeoutError

    class Overloaded(MemorySource):
        def read(self, group: int, rows: list[int]) -> list[tuple[str, bytes]]:
            if self.reads.total() >= 2:
                Retries(first_wait_s=3600, longest_wait_s=3600).call("https://host/shard", overloaded)
            return super().read(group, rows)

    steps = iter(reader(Overloaded(GROUP_ROWS), lanes=8, batch=2, prefetch=Prefetch(threads=2, look_ahead=1)))
    next(steps)
    assert tried.wait(60)
    closing = threading.Thread(target=steps.close)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


def test_an_error_in_a_thread_is_raised_by_next_and_ends_the_threads() -> None:
    before = reader_threads()
    with pytest.raises(RuntimeError, match="row group 6 is gone"):
        for _ in islice(reader(MemorySource(GROUP_ROWS, broken=6), 24, 12), 100):
            pass
    assert reader_threads() == before


@pytest.mark.parametrize(("batch", "world", "start"), [(10, 4, 0), (0, 1, 0), (8, 4, -8)])
def test_impossible_splits_are_refused(batch: int, world: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"a positive multiple of|0 or more is expected"):
        reader(MemorySource(GROUP_ROWS), 24, batch, 0, world, start)
