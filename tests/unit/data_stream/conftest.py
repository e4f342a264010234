"""Datasets shared by the stream's tests."""

import pytest

from dinov2.data.parquet.source import ParquetSource
from tests.helpers.shards import write_dataset

SHARD_ROWS = [23, 5, 0, 1, 40, 17, 12]  # 98 rows in 27 row groups of up to 4 rows, none in the third shard


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> ParquetSource:
    """A dataset of uneven shards whose tiles are numbered in file order."""
    return ParquetSource(str(write_dataset(tmp_path_factory.mktemp("stream"), SHARD_ROWS)))
