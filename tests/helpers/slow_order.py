"""The order of samples spelt out with lists and Python integers, to check the vectorised one against."""

from collections.abc import Sequence
from itertools import zip_longest

MASK = 2**64 - 1


def splitmix64_stream(seed: int, count: int) -> list[int]:
    """The first outputs of the SplitMix64 generator, from its published C code."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def key(*words: int) -> int:
    """Fold words into one 64-bit key."""
    state = 0
    for word in words:
        state = splitmix64_stream(state ^ word, 1)[0]
    return state


def epoch_order(group_rows: Sequence[int], seed: int, lanes: int, block_rows: int, epoch: int) -> list[tuple[int, int]]:
    """List (group, row) of every sample of an epoch, by building the permutation and dealing out its read streams."""
    permuted = []
    for group in sorted(range(len(group_rows)), key=lambda group: key(seed, epoch, group)):
        rows = range(group_rows[group])
        for start in range(0, len(rows), block_rows):
            block = sorted(rows[start : start + block_rows], key=lambda row: key(seed, epoch, group, row))
            permuted += [(group, row) for row in block]
    length, longer = divmod(len(permuted), lanes)
    streams, start = [], 0
    for number in range(lanes):
        end = start + length + (number < longer)
        streams.append(permuted[start:end])
        start = end
    return [sample for turn in zip_longest(*streams) for sample in turn if sample is not None]
