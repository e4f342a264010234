"""Jobs over several processes that end with the one that started them."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_connection
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, unit: str
) -> Iterator[tuple[int, Result]]:
    """Run a function over jobs in several processes, with a progress bar on a terminal.

    Args:
        function: importable by name and not from a ``__main__`` module, since the processes are spawned. What it
            raises is raised here, and jobs (picklable) that have not begun are dropped.
        workers: processes; 1 runs everything in this one.
        unit: what the progress bar counts.

    Yields a job's index in ``jobs`` and its result, as they finish; ChildProcessError if a process was killed.
    """
    workers = min(workers, len(jobs))
    bar = tqdm(total=len(jobs), unit=unit, disable=None)
    if workers <= 1:
        with bar:
            for number, job in enumerate(jobs):
                result = function(job)
                bar.update()
                yield number, result
        return
    with bar, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        numbers: dict[Future[Result], int] = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                result = future.result()
                bar.update()
                yield numbers[future], result
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"One of {workers} processes was killed, perhaps for want of memory; try fewer --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Keep a process to one core, and let it end when the main one is killed instead of waiting for work for ever."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if cv2 := sys.modules.get("cv2"):  # loaded by the job's module, where that works on images
        cv2.setNumThreads(1)
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for_connection([sentinel]), os._exit(1)), daemon=True).start()
