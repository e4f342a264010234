"""What a step that was not finite had seen: samples, crops, losses and norms, in a folder of the run."""

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dinov2.distributed import get_global_rank
from dinov2.train.update.guard import FiniteGuard, NonFiniteError

logger = logging.getLogger("dinov2")

_KEPT = FiniteGuard.DELAY + 2  # batches: that of the bad step, and those that followed until the host looked
_MOST_RANKS, _MOST_IMAGES, _MOST_LOCALS = 8, 8, 2


class RecentBatches:
    """Passes batches on, from those after ``first_step`` completed steps, and keeps the newest few in host memory.

    A step takes so many batches, its ``accumulation``.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], first_step: int, accumulation: int = 1):
        self._batches, self._first_step, self._accumulation = batches, first_step, accumulation
        self._kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_KEPT * accumulation)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(self._batches):
            self._kept.append((self._first_step + number // self._accumulation + 1, batch))
            yield batch

    def of_step(self, step: int) -> list[dict[str, Any]]:
        """The batches of a step, the first of which is 1; none if they are not kept."""
        return [batch for number, batch in self._kept if number == step]


def with_dump(error: NonFiniteError, recent: RecentBatches, output_dir: Path) -> NonFiniteError:
    """Write ``dumps/step_N/`` on the ranks that the error is about, eight at most; return the error with its name.

    ``rank_R.json`` holds the rank's losses and gradient norms by module, and names its samples as a line of
    ``logs/samples.rankR.jsonl``, with their slides. ``rank_R/I_VIEW.png`` are the crops of the first eight samples of
    each micro-batch, I being the sample's index: all global views and two local ones, before normalisation, unmasked.
    """
    rank, batches = get_global_rank(), recent.of_step(error.step)
    if rank not in (error.ranks or range(_MOST_RANKS))[:_MOST_RANKS] or not batches:
        return error
    folder = output_dir / "dumps" / f"step_{error.step}"
    try:
        (folder / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
        crops = {name: pixels for batch in batches for name, pixels in _crops(batch).items()}
        described = {
            "step": error.step,
            "rank": rank,
            "values": {name: _written(value) for name, value in error.values.items()},
            "indices": [index for batch in batches for index in batch["indices"].tolist()],
            "rows": [row for batch in batches for row in batch.get("rows", ())],
            "slides": [slide for batch in batches for slide in batch.get("slides", ())],
        }
        (folder / f"rank_{rank}.json").write_text(json.dumps(described, indent=1, allow_nan=False) + "\n")
        for name, pixels in crops.items():
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"rank_{rank}" / f"{name}.png")
    except OSError as fault:
        logger.warning("Samples of step %d cannot be written to %s (%s).", error.step, folder, fault.strerror or fault)
        return error
    return NonFiniteError(f"{error} Its samples are in {folder}.", error.step, error.ranks, error.values)


def _crops(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Some crops of the first samples, uint8 (3, S, S), by sample and view."""
    found, indices = {}, batch["indices"].tolist()
    for kind, most in (("global", None), ("local", _MOST_LOCALS)):
        crops = batch[f"{kind}_crops"]
        for number, view in enumerate(crops.split(len(indices))[:most] if len(crops) else (), 1):
            for index, pixels in zip(indices[:_MOST_IMAGES], view, strict=False):
                found[f"{index}_{kind}{number}"] = pixels
    return found


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # of which JSON has none, and which tells inf from nan
