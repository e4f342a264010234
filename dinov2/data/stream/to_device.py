"""Batches on the training device, copied and prepared beside the step's own work."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Batch = dict[str, Any]


class DeviceBatches:
    """Batches on the device, where they are prepared.

    On a GPU both happen on a stream of their own. The host runs ahead of the device, so the copy of a batch and
    its preparation overlap with the step before; the step itself only waits for an event. Copies need no wait
    of the host where the batch lies in page-locked memory.

    Args:
        batches: batch dicts with tensors on the CPU; other values pass as they are.
        device: target.
        prepare: called with each moved batch; returns what is yielded.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], Batch]) -> None:
        self._batches, self._device, self._prepare = batches, device, prepare

    def __iter__(self) -> Iterator[Batch]:
        side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for batch in self._batches:
            with torch.cuda.stream(side) if side else contextlib.nullcontext():
                moved = {
                    name: value.to(self._device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
                prepared = self._prepare(moved)
            if side:  # which the step's stream waits for; the tensors' memory stays until that is done with them
                stream = torch.cuda.current_stream(self._device)
                stream.wait_stream(side)
                for value in prepared.values():
                    if isinstance(value, torch.Tensor):
                        value.record_stream(stream)
            yield prepared
