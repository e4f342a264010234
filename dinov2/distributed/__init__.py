"""Process group, ranks, and collectives that are the identity in a single process.

Nothing above this package asks whether a run is distributed: without a process group there is one rank, number 0,
and every collective returns what it was given. All ranks must call a collective.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.utils.cli import LOST, Stopped, ToldElsewhere

# Ranks wait while rank 0 downloads weights or reads the footers of a large dataset.
_TIMEOUT = timedelta(minutes=30)
_T = TypeVar("_T")
_alone = ContextVar("alone", default=False)


# What gloo and NCCL say where the process at the other end is gone.
_PEER_LOST = re.compile(r"(closed|reset) by peer|broken pipe|remote process exited|connection refused", re.IGNORECASE)


class MainProcessError(ToldElsewhere):
    """Rank 0 failed at what the others waited for; the cause is raised there."""


def is_enabled() -> bool:
    """Say whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized() and not _alone.get()


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """While open, this process is the only one: for work that the other ranks take no part in."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def get_global_rank() -> int:
    """Return this process's rank among all processes of the run, 0 without a process group."""
    return dist.get_rank() if is_enabled() else 0


def get_global_size() -> int:
    """Return the number of processes of the run, 1 without a process group."""
    return dist.get_world_size() if is_enabled() else 1


def get_local_rank() -> int:
    """Return this process's rank on its own machine (torchrun's ``LOCAL_RANK``), 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Say whether this process is global rank 0, the one that writes what all ranks share."""
    return get_global_rank() == 0


def init_process_group(device: torch.device, timeout: timedelta = _TIMEOUT) -> None:
    """Join the process group that torchrun describes; does nothing when not started by torchrun.

    A collective that takes longer than ``timeout`` raises a `RuntimeError` (gloo) or ends the process (NCCL).

    CUDA tensors travel by NCCL and CPU tensors (objects, checkpoint metadata) by gloo. A CUDA device becomes the
    current one; without an index it is the one numbered by ``LOCAL_RANK``.
    """
    if "RANK" not in os.environ or is_enabled():
        return
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=timeout)
        return
    device = torch.device("cuda", get_local_rank() if device.index is None else device.index)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Belong to the process group that torchrun describes, if there is one, within the block.

    A rank that ends because of rank 0 waits a second before: torchrun ends all processes as soon as one has left,
    and rank 0 has something to say.
    """
    init_process_group(device)
    try:
        yield
    except MainProcessError:
        time.sleep(1)
        raise
    finally:
        destroy_process_group()


@contextlib.contextmanager
def peer_lost() -> Iterator[None]:
    """Turn what a collective raises within the block where another rank has ended into a `Stopped` of one sentence."""
    try:
        yield
    except RuntimeError as error:
        if get_global_size() == 1 or isinstance(error, Stopped | MainProcessError) or not _PEER_LOST.search(str(error)):
            raise
        raise Stopped(
            f"Rank {get_global_rank()} has lost another rank, which ended or was killed; the same command goes on from "
            "the newest checkpoint, if one was saved.",
            LOST,
        ) from error


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if is_enabled():
        dist.destroy_process_group()


def all_reduce_sum(t: Tensor) -> Tensor:
    """Sum ``t`` over all ranks in place and return it; no gradient flows."""
    return _all_reduce(t, dist.ReduceOp.SUM)


def all_reduce_min(t: Tensor) -> Tensor:
    """Take the minimum of ``t`` over all ranks in place and return it; no gradient flows."""
    return _all_reduce(t, dist.ReduceOp.MIN)


def all_reduce_max(t: Tensor) -> Tensor:
    """Take the maximum of ``t`` over all ranks in place and return it; no gradient flows."""
    return _all_reduce(t, dist.ReduceOp.MAX)


def _all_reduce(t: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if get_global_size() > 1:
        dist.all_reduce(t, op=op)
    return t


def all_gather_rows(t: Tensor) -> Tensor:
    """Stack the (B, D) rows of all ranks, of one shape and dtype, in rank order: (world * B, D), differentiably.

    The backward pass, which all ranks must run, adds up, for each row, the gradients that all ranks hold for it, and
    hands the sum to the row's owner. A loss that every rank computes from the gathered rows therefore yields ``world``
    times its gradient on each owner, and the data-parallel mean over ranks (DDP, FSDP) divides by ``world``: the
    parameters receive exactly the gradient of one process on the joined batch.
    """
    return _AllGatherRows.apply(t) if get_global_size() > 1 else t


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        gathered = t.new_empty(get_global_size() * t.shape[0], *t.shape[1:])
        dist.all_gather_into_tensor(gathered, t.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // get_global_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def background_group() -> dist.ProcessGroup | None:
    """A further group of all ranks for CPU objects, None in a single process; all ranks must call.

    The calls of one group must come in the same order on all ranks. A thread that talks to those of the other ranks
    while training goes on therefore has a group of its own.
    """
    return dist.new_group(backend="gloo") if is_enabled() else None


def broadcast_object(obj: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank ``src``'s picklable ``obj`` on every rank."""
    if get_global_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def gather_objects(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's picklable ``obj``, in order of the ranks."""
    if get_global_size() == 1:
        return [obj]
    box: list[Any] = [None] * get_global_size()
    dist.all_gather_object(box, obj, group=group)
    return box


def on_main_process(action: Callable[[], _T], group: dist.ProcessGroup | None = None) -> _T:
    """Return on every rank what ``action`` (picklable result) returns on rank 0.

    Where it raises there, rank 0 raises the error itself and the others MainProcessError. A ``group`` is one of all
    ranks, see `background_group`.
    """
    if get_global_size() == 1:
        return action()
    result, error = None, None
    if is_main_process():
        try:
            result = action()
        except Exception as raised:
            error = raised
    result, failed = broadcast_object((result, error is not None), group=group)
    if error is not None:
        raise error
    if failed:
        raise MainProcessError("Rank 0 could not go on.")
    return result
