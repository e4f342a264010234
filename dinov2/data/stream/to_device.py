"""Batches on the training device, copied and prepared beside the step's own work."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Batch = dict[str, Any]


def on_device(batches: Iterable[Batch], device: torch.device, prepare: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """Move the tensors of batches to the device, call `prepare` there, and yield what it returns.

    On a GPU both happen on a stream of their own. The host runs ahead of the device, so the copy of a batch and
    its preparation overlap with the step before; the step itself only waits for an event. Copies need no wait
    of the host where the batch lies in page-locked memory.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(side) if side else contextlib.nullcontext():
            moved = {
                name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            prepared = prepare(moved)
        if side:  # which the step's stream waits for; the tensors' memory stays until that is done with them
            stream = torch.cuda.current_stream(device)
            stream.wait_stream(side)
            for value in prepared.values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(stream)
        yield prepared
