"""The reader of a rank: fetches its rows ahead of use and hands them out in order."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dinov2.data.source import EncodedSample, Source
from dinov2.data.storage.retry import give_up_when
from dinov2.data.stream.memory import Prefetch
from dinov2.data.stream.order import SampleOrder

_Key = tuple[int, int, int]  # epoch, row group, chunk
_DEFAULT_PREFETCH = Prefetch()
_Fetches = dict[_Key, "Future[dict[int, EncodedSample]]"]


class RankReader:
    """Encoded rows of one rank, one list per step, without end.

    Step s on rank k holds samples ``start_sample + s*B + k*B/world + [0, B/world)``, B the global batch. It is the
    DataLoader's batch sampler, the rows its "indices": workers keep no state, their number affects no order and no I/O.

    Each chunk of a row group (see `SampleOrder.members`) is fetched once and its rows are freed as they are used.
    Threads start at the first `next()`, when the DataLoader has already forked its workers, and end with the
    iterator; what goes wrong in one is raised by `next()`. ValueError if the ranks cannot split the batch or
    `start_sample` is negative.
    """

    def __init__(
        self,
        source: Source,
        order: SampleOrder,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        start_sample: int,
        prefetch: Prefetch = _DEFAULT_PREFETCH,
    ) -> None:
        if global_batch < 1 or global_batch % world_size:
            raise ValueError(
                f"a global batch of {global_batch} cannot be split over {world_size} ranks; "
                f"a positive multiple of {world_size} is expected"
            )
        if start_sample < 0:
            raise ValueError(f"the stream cannot start at sample {start_sample}; 0 or more is expected")
        self._source, self._order = source, order
        self._batch, self._rank, self._rank_batch = global_batch, rank, global_batch // world_size
        self._start, self._prefetch = start_sample, prefetch

    def __iter__(self) -> Iterator[list[EncodedSample]]:
        fetches: _Fetches = {}
        window: deque[list[tuple[int, _Key]]] = deque()
        closed = threading.Event()
        pool = ThreadPoolExecutor(self._prefetch.threads, "dinov2-reader", initializer=give_up_when, initargs=(closed,))
        try:
            for first in itertools.count(self._start + self._rank * self._rank_batch, self._batch):
                window.append(self._plan(first, fetches, pool))
                if len(window) > self._prefetch.look_ahead:
                    yield [_take(fetches, g, key) for g, key in window.popleft()]
        finally:
            closed.set()  # a thread between two retries of a server may have minutes to sleep
            pool.shutdown(cancel_futures=True)

    def _plan(self, first: int, fetches: _Fetches, pool: ThreadPoolExecutor) -> list[tuple[int, _Key]]:
        """Locate one step's samples and start to fetch the chunks that are not yet on their way."""
        indices = np.arange(first, first + self._rank_batch)
        epoch, group, chunk, _ = (column.tolist() for column in self._order.locate(indices))
        keys = list(zip(epoch, group, chunk, strict=True))
        for key in keys:
            if key not in fetches:
                # Of a chunk that is shared with other ranks, or that an earlier launch began, only what is left to us.
                members, rows = self._order.members(*key)
                since_start = members - self._start
                own = (since_start >= 0) & (since_start % self._batch // self._rank_batch == self._rank)
                fetches[key] = pool.submit(self._fetch, key[1], members[own].tolist(), rows[own].tolist())
        return list(zip(indices.tolist(), keys, strict=True))

    def _fetch(self, group: int, indices: list[int], rows: list[int]) -> dict[int, EncodedSample]:
        stored = zip(indices, rows, self._source.read(group, rows), strict=True)
        return {g: EncodedSample(g, group, row, slide, data) for g, row, (slide, data) in stored}


def _take(fetches: _Fetches, index: int, key: _Key) -> EncodedSample:
    samples = fetches[key].result()
    sample = samples.pop(index)
    if not samples:
        del fetches[key]
    return sample
