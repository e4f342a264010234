"""The training loader with real worker processes: order, resumption, damage, shutdown."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from dinov2.data.augment.collate import Sample
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.stream.loader import TrainLoader, validate_stream_state, worker_lost
from dinov2.data.stream.order import SampleOrder
from tests.helpers import slow_order
from tests.helpers.shards import encode, tile, tile_number, write_dataset, write_published

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
BATCH, LANES, SEED, BLOCK = 24, 48, 9, 4
SHARD_ROWS = [23, 5, 0, 1, 40, 17, 12]  # 98 rows in 27 row groups of up to 4 rows, none in the third shard
ROWS = sum(SHARD_ROWS)
GOOD = [encode(tile(number), "png") for number in range(12)]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> ParquetSource:
    """A dataset of uneven shards whose tiles are numbered in file order."""
    return ParquetSource(str(write_dataset(tmp_path_factory.mktemp("stream"), SHARD_ROWS)))


def number_of(image: np.ndarray, index: int) -> tuple[int, int]:
    return tile_number(image), index


def threads_of(image: np.ndarray, index: int) -> tuple[tuple[int, int], int]:
    return (torch.get_num_threads(), cv2.getNumThreads()), index


def collate(samples: list[Sample]) -> dict[str, Any]:
    assert all(sample.crops[1] == sample.index for sample in samples)
    return {
        "indices": [sample.index for sample in samples],
        "numbers": [sample.crops[0] for sample in samples],
        "slides": [sample.slide for sample in samples],
        "replaced": sum(sample.replaced for sample in samples),
        "rows": [(sample.group, sample.row) for sample in samples],
    }


def make_loader(source: ParquetSource, rank: int = 0, world: int = 1, start: int = 0, **options) -> TrainLoader:
    options = {"transform": number_of, "collate": collate, "num_workers": 0, "global_batch": BATCH} | options
    lanes = options.pop("lanes", LANES)
    order = SampleOrder(source.group_rows, seed=SEED, lanes=lanes, block_rows=BLOCK)
    return TrainLoader(source, rank=rank, world_size=world, start_sample=start, order=order, **options)


def run(source: ParquetSource, world: int, workers: int, start: int, steps: int) -> tuple[list[int], list[int]]:
    """Join the batches of all ranks and return the sample indices and the tiles that came."""
    ranks = [make_loader(source, rank, world, start, num_workers=workers) for rank in range(world)]
    parts = [list(islice(rank, steps)) for rank in ranks]
    batches = [batch for step in zip(*parts, strict=True) for batch in step]
    return [g for batch in batches for g in batch["indices"]], [n for batch in batches for n in batch["numbers"]]


def expected(epochs: int) -> list[int]:
    """Tile numbers in the slow reference's order."""
    groups = [min(4, rows - first) for rows in SHARD_ROWS for first in range(0, rows, 4)]
    starts = np.cumsum(groups) - groups
    orders = [slow_order.epoch_order(groups, SEED, LANES, BLOCK, epoch) for epoch in range(epochs)]
    return [int(starts[group]) + row for order in orders for group, row in order]


@pytest.fixture(autouse=True)
def threads_before() -> set[threading.Thread]:
    """Threads that other tests in this process have left behind."""
    return set(threading.enumerate())


def assert_nothing_runs(threads_before: set[threading.Thread]) -> None:
    assert not multiprocessing.active_children()
    for thread in set(threading.enumerate()) - threads_before:
        thread.join(10)  # a queue's feeder thread ends a moment after the queue is closed
        assert not thread.is_alive(), thread.name


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 1), (2, 3), (8, 4)])
def test_order_is_the_same_for_any_ranks_and_workers(source: ParquetSource, world: int, workers: int) -> None:
    steps = 9  # 216 samples: over two epoch boundaries, both inside a batch
    indices, numbers = run(source, world, workers, 0, steps)
    assert indices == list(range(steps * BATCH))
    assert numbers == expected(3)[: steps * BATCH]
    assert sorted(numbers[:ROWS]) == sorted(numbers[ROWS : 2 * ROWS]) == list(range(ROWS))


def test_a_run_resumed_on_other_world_sizes_goes_on_without_a_gap(source: ParquetSource) -> None:
    numbers, start = [], 0
    for world, workers, steps in [(2, 1, 2), (3, 0, 1), (1, 2, 2), (4, 1, 2), (6, 0, 2)]:
        numbers += run(source, world, workers, start, steps)[1]
        start += steps * BATCH
    assert numbers == expected(3)[:start]


@pytest.mark.parametrize("start", [ROWS // BATCH * BATCH, ROWS, 2 * ROWS - 1, 1000 * ROWS + 7])
def test_seek_equals_the_uninterrupted_run(source: ParquetSource, start: int) -> None:
    epoch, offset = divmod(start, ROWS)
    groups = source.group_rows.tolist()
    starts = np.cumsum(groups) - groups
    orders = [slow_order.epoch_order(groups, SEED, LANES, BLOCK, e) for e in range(epoch, epoch + 3)]
    reference = [int(starts[group]) + row for order in orders for group, row in order][offset : offset + 3 * BATCH]
    indices, numbers = run(source, 1, 0, start, 3)
    assert indices == list(range(start, start + 3 * BATCH))
    assert numbers == reference


def test_spawned_workers_give_the_same_stream(source: ParquetSource) -> None:
    loader = make_loader(source, num_workers=1, start_method="spawn")
    assert [n for batch in islice(loader, 2) for n in batch["numbers"]] == expected(1)[: 2 * BATCH]


def test_workers_use_one_thread(source: ParquetSource) -> None:
    loader = make_loader(source, num_workers=1, transform=threads_of)
    assert set(next(iter(loader))["numbers"]) == {(1, 1)}


def test_a_worker_killed_during_a_step_is_one_that_was_lost(source: ParquetSource) -> None:
    """Of several: the others end after it, while the loader is closed, and are told of once more."""
    with (
        pytest.raises(ChildProcessError),
        worker_lost(),
        contextlib.closing(make_loader(source, num_workers=3)) as loader,
    ):
        batches = iter(loader)
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in range(6000):  # the main thread is in Python, not in the loader
            time.sleep(0.01)
    assert not multiprocessing.active_children()


def broken(error: type[Exception], *said: Any) -> None:
    raise error(*said)


class Broken:
    """Cannot be received, as from a worker that is killed while it sends and of which the system does not know yet."""

    def __init__(self, *error: Any):
        self.error = error

    def __reduce__(self):
        return broken, self.error


@pytest.mark.parametrize(
    "error", [(ConnectionResetError, 104, "reset"), (EOFError,), (RuntimeError, "received 0 items of ancdata")]
)
def test_a_worker_that_ends_while_it_sends_is_one_that_was_lost(source: ParquetSource, error: tuple) -> None:
    with pytest.raises(ChildProcessError):
        next(iter(make_loader(source, num_workers=1, collate=lambda samples: {"broken": Broken(*error)})))


def test_closing_ends_an_iteration_that_others_still_hold(source: ParquetSource) -> None:
    loader = make_loader(source, num_workers=1)
    loader.close()  # before there is one
    batches = iter(loader)
    next(batches)
    loader.close()
    assert not multiprocessing.active_children()
    assert next(batches, None) is None


def test_the_global_generator_is_left_alone(source: ParquetSource) -> None:
    before = torch.get_rng_state()
    next(iter(make_loader(source, num_workers=1)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_the_iteration_ends_threads_and_processes(
    source: ParquetSource, workers: int, threads_before: set[threading.Thread]
) -> None:
    for batch in make_loader(source, num_workers=workers):
        assert len(batch["indices"]) == BATCH
        break
    assert_nothing_runs(threads_before)


def fail_at_30(image: np.ndarray, index: int) -> tuple[int, int]:
    if index == 30:
        raise KeyError("transform broke")
    return 0, index


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_transform_surfaces_and_nothing_stays_behind(
    source: ParquetSource, workers: int, threads_before: set[threading.Thread]
) -> None:
    with pytest.raises(KeyError, match="transform broke"):
        list(make_loader(source, num_workers=workers, transform=fail_at_30))
    assert_nothing_runs(threads_before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_shard_stops_training_at_the_first_step_that_needs_it(
    tmp_path: Path, workers: int, threads_before: set[threading.Thread]
) -> None:
    for name in ("a", "b"):
        write_published(tmp_path / f"{name}.parquet", GOOD)
    source = ParquetSource(str(tmp_path))
    (tmp_path / "b.parquet").unlink()
    order = slow_order.epoch_order([4] * 6, SEED, 1, BLOCK, 0)
    steps_before = next(location for location, (group, _) in enumerate(order) if group >= 3) // 2
    assert steps_before > 0
    batches = []
    with pytest.raises(FileNotFoundError, match=r"b\.parquet"):
        for batch in make_loader(source, num_workers=workers, lanes=1, global_batch=2):
            batches.append(batch)
    assert len(batches) == steps_before
    assert_nothing_runs(threads_before)


def corrupt_source(folder: Path, bad: list[int]) -> ParquetSource:
    images = [GOOD[number][:40] if number in bad else GOOD[number] for number in range(12)]
    write_published(folder / "a.parquet", images, group=4)
    return ParquetSource(str(folder))


def test_corrupt_rows_give_way_to_the_next_good_row_of_their_group(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = corrupt_source(tmp_path, [1, 2, 7])  # groups are rows 0-3, 4-7, 8-11
    stands_in = {1: 3, 2: 3, 7: 4}
    order = slow_order.epoch_order([4, 4, 4], SEED, LANES, BLOCK, 0)
    reference = [stands_in.get(4 * group + row, 4 * group + row) for group, row in order]
    for world, workers in [(1, 0), (3, 1)]:
        caplog.clear()
        ranks = [make_loader(source, rank, world, global_batch=12, num_workers=workers) for rank in range(world)]
        batches = [next(iter(rank)) for rank in ranks]
        assert [number for batch in batches for number in batch["numbers"]] == reference
        assert sum(batch["replaced"] for batch in batches) == 3
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        locations = {(1, 0), (2, 0), (3, 1)}  # row in its group, group
        assert len(warnings) == 3
        for row, group in locations:
            named = f"row {row} of row group {group} of shard '{tmp_path / 'a.parquet'}': a PNG file of 40 bytes"
            assert any(named in warning for warning in warnings)


def test_too_much_damage_stops_with_the_first_rows_named(tmp_path: Path) -> None:
    source = corrupt_source(tmp_path, [1, 2, 7])
    assert len(list(islice(make_loader(source, max_corrupt_fraction=0.0013), 2))) == 2  # 12 of the first 10,000
    loader = make_loader(source, max_corrupt_fraction=0.0011)
    with pytest.raises(ValueError, match=r"12 of 48 samples \(25.00%\) are corrupt, where 0.11% is allowed: row"):
        list(islice(loader, 2))
    with pytest.raises(ValueError, match="6 of 24 samples"):
        next(iter(make_loader(source, max_corrupt_fraction=0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_group_without_any_image_come_from_the_next_group_that_has_one(tmp_path: Path, workers: int) -> None:
    source = corrupt_source(tmp_path, [4, 5, 6, 7, 8])
    order = slow_order.epoch_order([4, 4, 4], SEED, LANES, BLOCK, 0)
    stands_in = {number: 9 for number in range(4, 9)}
    reference = [stands_in.get(4 * group + row, 4 * group + row) for group, row in order]
    batch = next(iter(make_loader(source, num_workers=workers, global_batch=12)))
    assert batch["numbers"] == reference
    assert batch["replaced"] == 5
    assert [4 * group + row for group, row in batch["rows"]] == reference


def test_the_last_group_is_followed_by_the_first(tmp_path: Path) -> None:
    batch = next(iter(make_loader(corrupt_source(tmp_path, [0, 8, 9, 10, 11]), global_batch=12)))
    assert sorted(batch["numbers"]) == sorted([1, 1, 2, 3, 4, 5, 6, 7, 1, 1, 1, 1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_any_image_is_named(tmp_path: Path, workers: int) -> None:
    loader = make_loader(corrupt_source(tmp_path, list(range(12))), num_workers=workers)
    with pytest.raises(
        ValueError, match=r"none of the 4 rows of row group . of shard '.*a.parquet' is an image \(row . of"
    ):
        next(iter(loader))


def test_stream_state_admits_the_same_stream_only(source: ParquetSource) -> None:
    state = make_loader(source, world=2, start=48).stream_state
    expected = {"seed": SEED, "lanes": LANES, "block_rows": BLOCK, "global_batch": BATCH}
    assert state == {**expected, "fingerprint": source.fingerprint}
    validate_stream_state(dict(state), state, "tiles")
    with pytest.raises(ValueError, match="dataset 'tiles' changed since the checkpoint"):
        validate_stream_state(state | {"fingerprint": "0"}, state, "tiles")
    with pytest.raises(ValueError, match=r"order of samples \(lanes 96 is now 48\)"):
        validate_stream_state(state | {"lanes": 96}, state, "tiles")
