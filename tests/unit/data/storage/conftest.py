"""A hub that this process and its children talk to, and retries that do not wait long."""

from pathlib import Path

import numpy as np
import pytest

from dinov2.data.storage.retry import Retries


@pytest.fixture
def quick(tmp_path: Path) -> Retries:
    """Tries for two seconds, pauses of their own."""
    folder = tmp_path / "pauses"
    folder.mkdir()
    return Retries(2.0, 0.01, 0.05, connect_s=5.0, read_s=5.0, pause_folder=str(folder))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Random bytes under the names of shards, besides other files."""
    generator, folder = np.random.default_rng(0), tmp_path / "tiles"
    for name, size in {"data/a.parquet": 70_001, "data/deep/b.parquet": 5000, "c d.parquet": 1}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.bytes(size))
    (folder / ".cache").mkdir()
    (folder / ".cache/x.parquet").write_bytes(b"hidden")
    (folder / "README.md").write_text("Tiles of some slides.\n")
    return folder
