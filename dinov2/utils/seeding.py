"""Random streams that are pure functions of what they belong to, so that nothing random needs saving."""

from hashlib import blake2b

import numpy as np


def sample_rng(seed: int, index: int, stream: int, part: int = 0) -> np.random.Generator:
    """Return the generator of one stream of one sample, independent of rank, worker and order of calls.

    Philox is counter based: ``(seed, index)`` is its key; ``stream`` and ``part`` are the two highest words of its
    counter, so that the streams of one key lie 2^128 blocks apart and never meet. All are in [0, 2^64). ``index`` is
    the global sample index, or another number that names the owner; ``part`` is such as a view of the sample.
    """
    # A plain list with a number above 2^63 would pass through float64 and lose its low bits.
    key = np.array([seed, index], np.uint64)
    counter = np.array([0, 0, part, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class SampleStreams:
    """All streams of one sample by one generator, which is moved: twenty times as fast as a `sample_rng` for each."""

    def __init__(self, seed: int, index: int) -> None:
        self._rng = sample_rng(seed, index, 0)
        self._counter = [0, 0, 0, 0]
        self._state = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": (seed, index)},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def move(self, stream: int, part: int) -> np.random.Generator:
        """Return the generator, which now draws what ``sample_rng(seed, index, stream, part)`` would."""
        self._counter[2:] = part, stream
        self._rng.bit_generator.state = self._state
        return self._rng


def splitmix64(seed: np.ndarray) -> np.ndarray:
    """Return the first output of the SplitMix64 generator for each uint64 seed (Steele, Lea and Flood, 2014)."""
    z = seed + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)  # in place: the permutation of an epoch hashes every row group
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """Hash broadcastable integers to uint64: h = splitmix64(h ^ word) for each word in turn, from h = 0.

    Every step is a bijection, so hashes that differ in their last word only never collide.
    """
    state = np.zeros(1, np.uint64)  # an array, because numpy warns when a scalar wraps around
    for word in words:
        state = splitmix64(state ^ np.asarray(word).astype(np.uint64))
    return state


def hash_name(name: str) -> int:
    """Hash a name to 64 bits (BLAKE2b), the same in every process and version."""
    return int.from_bytes(blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed in [0, 2^63) for the device randomness of one step on one rank (``torch.manual_seed``)."""
    return int(hash_words(seed, step, rank)[0]) >> 1
