"""Random streams: independence, repeatability, known answers."""

import itertools

import numpy as np
import torch

from dinov2.utils.seeding import SampleStreams, hash_name, hash_words, sample_rng, splitmix64, step_seed
from tests.helpers import slow_order


def test_streams_repeat_and_differ():
    indices = (0, 1, 10**12, 2**64 - 2, 2**64 - 1)
    keys = list(itertools.product((0, 1, 2**64 - 1), indices, (0, 1, 1 << 32)))
    draws = np.array([sample_rng(*key).random(64) for key in keys])
    again = np.array([sample_rng(*key).random(64) for key in reversed(keys)])[::-1]
    assert np.array_equal(draws, again)
    assert len(np.unique(draws)) == draws.size
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.6  # 4.8 sigma at 64 draws


def test_neighbouring_samples_are_uncorrelated():
    first = np.array([sample_rng(0, index, 0).random() for index in range(4000)])
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / np.sqrt(4000)
    assert abs(first.mean() - 0.5) < 4 / np.sqrt(12 * 4000)


def test_a_moved_generator_draws_what_one_of_its_own_would():
    for seed, index in ((0, 0), (7, 5), (2**64 - 1, 2**64 - 1)):
        streams = SampleStreams(seed, index)
        for stream, part in ((3, 0), (2**64 - 5, 2**63 + 1), (3, 1), (3, 0)):
            rng = streams.move(stream, part)
            assert np.array_equal(rng.random(9), sample_rng(seed, index, stream, part).random(9))
            rng.integers(7, dtype=np.uint32)  # leaves half a word behind


def test_names_are_hashed_as_b2sum_does():
    # printf NAME | b2sum -l 64
    assert hash_name("TCGA-02-0001") == 0x3890BD91DBDDBD41
    assert hash_name("Präparat 3") == 0x0E97496DBA00126B


def test_hash_is_splitmix64_as_published() -> None:
    # First outputs for seed 0 (prng.di.unimi.it's reference code) and 1234567 (Rosetta Code's test value).
    seeds = np.array([0, 1234567], np.uint64)
    assert splitmix64(seeds).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]
    assert slow_order.splitmix64_stream(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_keys_equal_the_python_fold_at_the_ends_of_the_range() -> None:
    for words in [(0,), (2**64 - 1, 0, 7), (1, 10**9, 2**40, 63)]:
        assert hash_words(*words).tolist() == [slow_order.key(*words)]


def test_step_seeds_are_what_they_were():
    assert step_seed(0, 0, 0) == slow_order.key(0, 0, 0) >> 1
    assert step_seed(2**64 - 1, 10**6, 511) == slow_order.key(2**64 - 1, 10**6, 511) >> 1


def test_step_seeds_are_distinct_and_accepted_by_torch():
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in range(300) for rank in range(8)}
    assert len(seeds) == 2 * 300 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))
