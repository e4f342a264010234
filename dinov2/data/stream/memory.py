"""Memory of encoded data that the reader of one process may hold, and the read streams (lanes) that fit into it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dinov2.data.source import Source
from dinov2.data.stream.order import SampleOrder

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class Prefetch:
    """Look-ahead of the reader of one process."""

    threads: int = 4  # row groups fetched at a time
    look_ahead: int = 8  # steps planned before they are asked for

    @classmethod
    def suited_to(cls, source: Source, limit: float) -> "Prefetch":
        """Hide a network's latency by many requests, as far as what they hold stays below an eighth of `limit`."""
        if not source.is_remote:
            return cls()
        at_a_time = limit / 8 // (2 * int(source.group_bytes.max()))
        return cls(threads=int(min(16, max(1, at_a_time))), look_ahead=32)


def memory_bound(source: Source, order: SampleOrder, *, global_batch: int, world_size: int, prefetch: Prefetch) -> int:
    """Bytes of encoded images that one process's reader can hold at once.

    A read stream holds rows of one row group, at most its part of an epoch, and V / world_size streams' worth of rows
    belong to one process, at worst those of the largest row groups; where streams outnumber row groups, each holds its
    own part of one. The look-ahead may open a stream's next row group early, when no more than its own rows are left
    of the one before, and each thread holds up to twice a row group while it picks rows.
    """
    rank_batch = global_batch // world_size
    firsts = [first for first, _ in order.parts] + [len(source.group_rows)]
    total, largest_row = 0.0, 0.0
    for (first, part), end in zip(order.parts, firsts[1:], strict=True):
        rows, sizes = _once(source.group_rows[first:end]), _once(source.group_bytes[first:end])
        rows, sizes = rows[rows > 0], sizes[rows > 0]
        per_row = sizes / rows
        held = np.sort(np.minimum(sizes, per_row * -(-part.num_rows // part.lanes)))[::-1]
        repeats, rest = divmod(-(-part.lanes * rank_batch // global_batch), len(held))
        total += held.sum() * repeats + held[:rest].sum()
        largest_row = max(largest_row, per_row.max())
    lanes = -(-order.lanes * rank_batch // global_batch)
    early = largest_row * ((prefetch.look_ahead + 1) * rank_batch + lanes)
    sizes = np.sort(_once(source.group_bytes))[-prefetch.threads :]
    reading = 2 * (sizes.sum() + (prefetch.threads - len(sizes)) * sizes[-1])
    return int(total + early + reading)


def _once(column: np.ndarray) -> np.ndarray:
    """Return a single value of a column that repeats one without holding it, as an endless source's do."""
    return column[:1] if column.strides == (0,) else column


def fit_lanes(
    make_order: Callable[[int], SampleOrder],
    source: Source,
    *,
    lanes: int,
    global_batch: int,
    world_size: int,
    limit_gib: float,
    most: int = 8,
) -> int:
    """Choose V, the number of read streams; ValueError if it exceeds the rows, or what must be held the limit.

    Args:
        make_order: makes the order of the `source` for a number of read streams.
        lanes: V as the user wants it; 0 takes the first that fits of `most`, 1/2, 1/4 ... of it times the batch.
            Whole multiples keep a stream on one process; below them several processes fetch the same row groups.
        global_batch, world_size: samples per step over all processes, and their number.
        limit_gib: most that the reader of one process may hold, in GiB.
        most: read streams per sample of the batch to begin with.
    """
    rows = int(source.group_rows.sum())
    if lanes > rows:
        raise ValueError(
            f"data.lanes = {lanes} exceeds the {rows} rows of the dataset; at most {rows}, or 0 for a "
            "number that fits, is accepted."
        )
    candidates = [lanes]
    if not lanes:
        fewest, lanes = len(make_order(rows).parts), most * global_batch
        halvings = (lanes & -lanes).bit_length()
        halves = [lanes >> n for n in range(halvings) if lanes >> n >= fewest]
        possible = [lanes for lanes in halves if lanes <= rows] or [fewest]
        # More read streams than row groups would begin side by side in the same ones, and a batch would come from few.
        candidates = [lanes for lanes in possible if lanes <= np.count_nonzero(source.group_rows)] or possible[-1:]
    limit = limit_gib * GIB
    prefetch = Prefetch.suited_to(source, limit)
    needed = []
    for candidate in candidates:
        bound = memory_bound(
            source, make_order(candidate), global_batch=global_batch, world_size=world_size, prefetch=prefetch
        )
        if bound <= limit:
            if needed:
                logger.warning(
                    "reading %d lanes side by side would hold up to %.1f GiB on each process, so it is %d, with "
                    "fewer slides per batch; row groups of 64 rows (python -m dinov2.data.repack) or a larger "
                    "data.memory_gib (%g) allow more", needed[0][0], needed[0][1] / GIB, candidate, limit_gib,
                )  # fmt: skip
            return candidate
        needed.append((candidate, bound))
    fewest, bound = needed[-1]
    raise ValueError(
        f"The dataset's row groups of up to {int(source.group_bytes.max()) / GIB:.2g} GiB take {bound / GIB:.1f} GiB "
        f"on each process even with {fewest} lanes, and data.memory_gib = {limit_gib:g}; raise it, or rewrite "
        "the dataset with python -m dinov2.data.repack."
    )
