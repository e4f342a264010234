"""Collectives and process-group set-up, in one process and over two gloo ranks."""

import threading

import pytest
import torch

from dinov2 import distributed
from tests.helpers.spawn import run_ranks


@pytest.mark.parametrize(
    "collective",
    [
        distributed.all_reduce_sum,
        distributed.all_reduce_min,
        distributed.all_reduce_max,
        distributed.all_gather_rows,
    ],
)
def test_single_process_collectives_return_their_argument(collective):
    t = torch.randn(3, 2, requires_grad=True)
    assert collective(t) is t


def test_single_process_is_rank_zero_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    distributed.init_process_group(torch.device("cpu"))
    assert not distributed.is_enabled()
    assert (distributed.get_global_rank(), distributed.get_local_rank()) == (0, 0)
    assert distributed.get_global_size() == 1
    assert distributed.is_main_process()
    assert distributed.broadcast_object("anything") == "anything"
    distributed.destroy_process_group()


def test_incomplete_torchrun_environment_names_what_is_missing(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        distributed.init_process_group(torch.device("cpu"))


def test_torchrun_environment_opens_and_closes_a_group(monkeypatch):
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    distributed.init_process_group(torch.device("cpu"))
    assert distributed.is_enabled()
    distributed.destroy_process_group()
    assert not distributed.is_enabled()


def _collectives(rank: int) -> dict:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10**rank
    rows.requires_grad_()
    gathered = distributed.all_gather_rows(rows)
    # Each rank weighs the gathered rows differently; an owner must receive the sum over both ranks.
    (gathered * torch.arange(8.0).view(4, 2) * (rank + 1)).sum().backward()
    return {
        "rank": (distributed.get_global_rank(), distributed.get_global_size(), distributed.is_main_process()),
        "sum": distributed.all_reduce_sum(torch.tensor([1, 2]) + rank),
        "min": distributed.all_reduce_min(torch.tensor([1.0, -2.0]) * (rank + 1)),
        "max": distributed.all_reduce_max(torch.tensor([1.0, -2.0]) * (rank + 1)),
        "gathered": gathered.detach(),
        "grad": rows.grad,
        "object": distributed.broadcast_object({"from": rank}, src=1),
    }


def test_two_ranks():
    first, second = run_ranks(_collectives)
    assert first["rank"] == (0, 2, True)
    assert second["rank"] == (1, 2, False)
    for result in (first, second):
        assert result["sum"].tolist() == [3, 5]
        assert result["min"].tolist() == [1.0, -4.0]
        assert result["max"].tolist() == [2.0, -2.0]
        assert result["gathered"].tolist() == [[1, 2], [3, 4], [10, 20], [30, 40]]
        assert result["object"] == {"from": 1}
    assert first["grad"].tolist() == [[0, 3], [6, 9]]
    assert second["grad"].tolist() == [[12, 15], [18, 21]]


def _fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise LookupError("only this rank is wrong")
    distributed.all_reduce_sum(torch.zeros(1))


def test_runner_reports_the_failing_rank_first():
    with pytest.raises(RuntimeError, match=r"\Arank 1:\n.*(?s:.*)LookupError: only this rank is wrong"):
        run_ranks(_fail_on_rank_one)


def _wait_forever(rank: int) -> None:
    threading.Event().wait()


def test_runner_ends_ranks_that_never_finish():
    with pytest.raises(TimeoutError):
        run_ranks(_wait_forever, timeout_s=1.0)
