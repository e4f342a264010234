"""One small dataset for all training runs of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import write_tissue_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "shards")
