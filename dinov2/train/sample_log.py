"""A record of which samples every step consumed, for audits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dinov2.distributed import get_global_size


class SampleLog:
    """Passes batches on and appends a JSON line for each: the step and the samples it consumes on this rank.

    A line holds ``step`` (the first one is 1), ``ranks`` (their number), ``indices`` (global sample indices) and
    ``rows`` (unit and row of each, as the stream numbers them; of the row that stands in, where one was corrupt).
    After a resume the last line of a step is the valid one, on as many ranks as rank 0's says.

    Args:
        batches: batch dicts of this rank with ``indices`` (B,) and ``rows``, on the CPU.
        path: file to append to.
        first_step: completed steps before the first batch.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], path: Path, first_step: int):
        self._batches, self._path, self._first_step = batches, path, first_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._path.open("a", buffering=1) as file:
            for step, batch in enumerate(self._batches, self._first_step + 1):
                line = {"step": step, "ranks": get_global_size(), "indices": batch["indices"].tolist()}
                line["rows"] = batch["rows"]
                file.write(json.dumps(line) + "\n")
                yield batch
