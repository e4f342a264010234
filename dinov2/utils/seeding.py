"""Random streams that are pure functions of what they belong to, so that nothing random needs saving."""

from __future__ import annotations

import numpy as np
import torch

_UINT64 = (1 << 64) - 1


def sample_rng(seed: int, index: int, stream: int) -> np.random.Generator:
    """Generator of one stream of one sample, independent of rank, worker and order of calls.

    Philox is counter based: ``(seed, index)`` is its key and ``stream`` the highest word of its counter, so
    the streams of one key lie 2^192 blocks apart and never meet.

    Args:
        seed: Seed of the run, in [0, 2^64).
        index: Global sample index (or any other number that names the owner), in [0, 2^64).
        stream: Which of the owner's streams, in [0, 2^64).
    """
    # A plain list with a number above 2^63 would pass through float64 and lose its low bits.
    key = np.array([seed, index], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def fresh_rng() -> np.random.Generator:
    """Generator seeded by one draw from torch's global generator, so ``torch.manual_seed`` governs it."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed in [0, 2^63) for the device randomness of one step on one rank (``torch.manual_seed``).

    h = mix(mix(mix(seed) ^ step) ^ rank), mix being one round of splitmix64 (Steele et al., 2014).
    """
    state = _splitmix64(seed)
    state = _splitmix64(state ^ step)
    return _splitmix64(state ^ rank) >> 1


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)
