"""Run a function on several gloo ranks, each in its own process."""

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(fn: Callable[..., Any], *args: Any, world_size: int = 2, timeout_s: float = 300.0) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank of a fresh gloo process group.

    Args:
        fn: function defined at module level; it and ``args`` must be picklable.
        args: passed to every rank alike.
        world_size: number of processes.
        timeout_s: seconds after which all ranks are ended.

    Returns:
        What each rank returned, in rank order (anything that ``torch.save`` takes).

    Raises:
        RuntimeError: a rank raised; the message holds the ranks' tracebacks, first to fail first.
        TimeoutError: not all ranks had finished in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_run_rank, (world_size, folder, fn, args), nprocs=world_size, join=False)
        try:
            _wait(context, time.monotonic() + timeout_s)
        except mp.ProcessRaisedException as error:
            raise RuntimeError(_tracebacks(Path(folder))) from error
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _wait(context: mp.ProcessContext, deadline: float) -> None:
    while not context.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=5.0):
        if time.monotonic() >= deadline:
            raise TimeoutError("not all ranks finished in time")


def _tracebacks(folder: Path) -> str:
    by_age = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return "\n".join(f"rank {path.stem}:\n{path.read_text()}" for path in by_age)


def _run_rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(fn(rank, *args), Path(folder, f"{rank}.pt"))
    except Exception:
        # Written before the group is torn down, so that the peers' broken-connection errors are younger.
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
    # Not through the interpreter's end: there gloo's threads sometimes abort a process that has done its work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
