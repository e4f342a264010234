"""Several datasets in one order, each with its fraction of the samples.

The V read streams (`lanes`) are divided among the datasets by weight, n_d of them to dataset d, and the V slots of
one turn dealt out so that every stretch of samples holds each dataset in proportion. Global sample index g falls into
slot g % V; if that is the k-th slot of dataset d, the sample is number

    j = (g // V) * n_d + k

of the dataset's own order, which has n_d read streams and its own seed. So each dataset goes through epochs of its
own and visits each of its rows once in each; a small dataset with a large weight comes round more often.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dinov2.data.source import Source
from dinov2.data.stream.derived import first_groups, part_of
from dinov2.data.stream.order import Locations, SampleOrder
from dinov2.utils.seeding import hash_words


class MixedOrder(SampleOrder):
    """Order of a mixture; `lanes` and `block_rows` are V, of all datasets together, and R.

    ValueError if a weight is not positive and finite, weights and datasets differ in number, there are fewer lanes than
    datasets, a dataset holds no row, or a parameter is out of range.

    Args:
        group_rows: rows of each row group, for each dataset; row groups are numbered through, dataset by dataset.
        weights: fraction of the samples that each dataset gets, up to a common factor.
        seed: any integer in [0, 2**64); dataset d is ordered with hash_words(seed, d).
    """

    def __init__(
        self, group_rows: Sequence[np.ndarray], weights: Sequence[float], *, seed: int, lanes: int, block_rows: int
    ) -> None:
        if len(weights) != len(group_rows):
            raise ValueError(f"{len(weights)} weights are given for {len(group_rows)} datasets; one each is expected")
        empty = next((number for number, rows in enumerate(group_rows) if not np.any(rows)), None)
        if empty is not None:
            raise ValueError(f"dataset {empty + 1} of {len(group_rows)} in a mixture holds 0 rows; leave it out")
        super().__init__(np.concatenate(group_rows), seed=seed, lanes=lanes, block_rows=block_rows)
        counts = divide_lanes(weights, lanes)
        orders = [
            SampleOrder(rows, seed=int(hash_words(seed, d)[0]), lanes=counts[d], block_rows=block_rows)
            for d, rows in enumerate(group_rows)
        ]
        self.parts = list(zip(first_groups(group_rows), orders, strict=True))
        self._dataset = spread(counts)
        self._slots = [np.flatnonzero(self._dataset == d) for d in range(len(counts))]
        self._number = np.empty_like(self._dataset)  # k of each slot
        for slots in self._slots:
            self._number[slots] = np.arange(len(slots))

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the order besides the datasets; of the weights only the read streams that they came to."""
        return super().parameters | {"dataset_lanes": [order.lanes for _, order in self.parts]}

    def locate(self, indices: np.ndarray) -> Locations:
        """Find global sample indices, int64 (n,), in any order; `epoch` is the dataset's own."""
        turn, slot = np.divmod(np.asarray(indices, np.int64), self.lanes)
        dataset = self._dataset[slot]
        locations = Locations(*np.empty((4, len(turn)), np.int64))
        for d in np.unique(dataset):
            here = dataset == d
            first, order = self.parts[d]
            found = order.locate(turn[here] * order.lanes + self._number[slot[here]])
            for column, values in zip(locations, found._replace(group=found.group + first), strict=True):
                column[here] = values
        return locations

    def members(self, epoch: int, group: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """List the samples of one chunk of a row group, as `SampleOrder.members` does."""
        d = part_of(self.parts, group)
        first, order = self.parts[d]
        own, rows = order.members(epoch, group - first, chunk)
        turn, k = np.divmod(own, order.lanes)
        return turn * self.lanes + self._slots[d][k], rows


def make_order(
    sources: Sequence[Source], weights: Sequence[float], *, seed: int, lanes: int, block_rows: int
) -> SampleOrder:
    """Order the rows of `make_source(sources)`, see `MixedOrder`; a single dataset is in `SampleOrder`."""
    group_rows = [source.group_rows for source in sources]
    if len(sources) == 1:
        (lanes,) = divide_lanes(weights, lanes)
        return SampleOrder(group_rows[0], seed=seed, lanes=lanes, block_rows=block_rows)
    return MixedOrder(group_rows, weights, seed=seed, lanes=lanes, block_rows=block_rows)


def describe_fractions(order: SampleOrder, datasets: Sequence[str]) -> list[str]:
    """Tell the user each dataset's rows and actual fraction of the samples, a line per dataset."""
    return [
        f"dataset '{name}': {part.num_rows:,} rows, {part.lanes / order.lanes:.2%} of the samples "
        f"({part.lanes} of {order.lanes} lanes)"
        for name, (_, part) in zip(datasets, order.parts, strict=True)
    ]


def divide_lanes(weights: Sequence[float], lanes: int) -> list[int]:
    """Divide read streams in proportion to weights, by largest remainder in exact arithmetic; each gets at least one.

    ValueError if a weight is not positive and finite, or there are fewer streams than weights.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"a dataset's weight is {weight}; a positive finite number is expected")
    if lanes < len(weights):
        raise ValueError(f"a mixture of {len(weights)} datasets needs as many lanes, but the order has {lanes}")
    exact = [Fraction(weight) for weight in weights]
    counts, left, pending = [1] * len(weights), lanes, list(range(len(weights)))
    # Whoever is due less than one stream gets one. That leaves less for the others, so the test is made again.
    while small := [d for d in pending if exact[d] * left < sum(exact[p] for p in pending)]:
        left -= len(small)
        pending = [d for d in pending if d not in small]
    total = sum(exact[d] for d in pending)
    due = {d: exact[d] * left / total for d in pending}
    for d, streams in due.items():
        counts[d] = math.floor(streams)
    by_remainder = sorted(pending, key=lambda d: counts[d] - due[d])
    for d in by_remainder[: lanes - sum(counts)]:
        counts[d] += 1
    return counts


def spread(counts: Sequence[int]) -> np.ndarray:
    """Deal out V = sum(counts) slots so that the first t hold n*t/V of a dataset with n slots, rounded up or down.

    A dataset's k-th slot lies between k*V/n rounded down and (k + 1)*V/n rounded up; of those whose turn has come
    the one that must come soonest is next. No deadline is missed: earliest deadline first is optimal for unit
    jobs, and the jobs that must be done within any span are no more than its slots. Gives each slot's dataset, (V,).
    """
    n = np.asarray(counts, np.int64)
    total = int(n.sum())
    taken = np.zeros_like(n)
    slots = np.empty(total, np.int64)
    for slot in range(total):
        deadline = -(-(taken + 1) * total // n)
        deadline[taken * total >= (slot + 1) * n] = total + 1  # its turn has not come
        slots[slot] = deadline.argmin()
        taken[slots[slot]] += 1
    return slots
