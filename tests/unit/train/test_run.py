"""The record of consumed samples."""

import json
from itertools import islice
from pathlib import Path

import torch

from dinov2.train.run import logged_samples


def test_each_batch_is_on_record_when_it_is_handed_over_and_no_sooner(tmp_path: Path) -> None:
    batches = [{"indices": torch.arange(8 * s, 8 * s + 2), "rows": [(s, 0), (s, 3)]} for s in range(3)]
    path = tmp_path / "samples.rank0.jsonl"
    path.write_text('{"step": 4}\n{"step": 5, "ra')  # cut short by a kill
    steps = logged_samples(batches, path, first_step=4)
    assert list(islice(steps, 2)) == batches[:2]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 4},
        {"step": 5, "ranks": 1, "indices": [0, 1], "rows": [[0, 0], [0, 3]]},
        {"step": 6, "ranks": 1, "indices": [8, 9], "rows": [[1, 0], [1, 3]]},
    ]
