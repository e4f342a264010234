"""Batches on the device."""

import pytest
import torch

from dinov2.data.stream.to_device import on_device


def batches(count: int = 3) -> list[dict]:
    return [{"x": torch.full((4,), step), "slides": ["a"], "replaced": step} for step in range(count)]


def test_tensors_move_the_rest_passes_and_each_batch_is_prepared_once() -> None:
    prepared = []

    def prepare(batch: dict) -> dict:
        prepared.append(int(batch["x"][0]))
        return batch | {"x": batch["x"] * 2.0}

    moved = on_device(batches(), torch.device("cpu"), prepare)
    for step, batch in enumerate(moved):
        assert prepared == list(range(step + 1))  # not ahead of its use
        assert torch.equal(batch["x"], torch.full((4,), 2.0 * step))
        assert (batch["slides"], batch["replaced"]) == (["a"], step)


def test_an_error_of_the_loader_comes_after_the_batches_before_it() -> None:
    def failing():
        yield from batches(2)
        raise OSError("the network is gone")

    steps = on_device(failing(), torch.device("cpu"), lambda batch: batch)
    assert [next(steps)["replaced"] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the network is gone"):
        next(steps)


@pytest.mark.gpu
def test_batches_prepared_on_a_side_stream_are_whole_when_used() -> None:
    device = torch.device("cuda")
    size = 1 << 22
    pinned = [{"x": torch.full((size,), float(step)).pin_memory()} for step in range(20)]

    def prepare(batch: dict) -> dict:
        x = batch["x"]
        for _ in range(20):
            x = x + 1
        return batch | {"x": x}

    for step, batch in enumerate(on_device(pinned, device, prepare)):
        total = (batch["x"] - 20 - step).abs().sum()
        del batch
        scratch = torch.empty(size, device=device).fill_(-1)  # takes freed memory, were it given back too early
        assert total.item() == 0
        assert scratch[0].item() == -1
