"""Random ranges read through a storage, compared with the local files."""

from pathlib import Path

import numpy as np

from dinov2.data.storage.base import Storage

NAMES = ["c d.parquet", "data/a.parquet", "data/deep/b.parquet"]
"""The shards that `tests/unit/data/storage/conftest.py` makes, in order."""


def read_ranges(storage: Storage, folder: Path, seed: int, count: int = 20) -> int:
    """Read random ranges and count those that differ from the local file."""
    generator, wrong = np.random.default_rng(seed), 0
    for _ in range(count):
        name = NAMES[generator.integers(3)]
        content = (folder / name).read_bytes()
        start = int(generator.integers(len(content)))
        length = int(generator.integers(len(content) - start + 1))
        wrong += storage.read_range(name, start, length) != content[start : start + length]
    return wrong
