"""Jobs over several processes that end with the one that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for_connection
from typing import TypeVar

from tqdm import tqdm

from dinov2.utils.cli import Terminated

Job = TypeVar("Job")
Result = TypeVar("Result")

_is_busy = False  # in a worker: with a job


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, unit: str
) -> Iterator[tuple[int, Result]]:
    """Run a function over jobs in several processes, with a progress bar on a terminal.

    Args:
        function: importable by name and not from a ``__main__`` module, since the processes are spawned. What it
            raises is raised here, and jobs (picklable) that have not begun are dropped.
        workers: processes; 1 runs everything in this one.
        unit: what the progress bar counts.

    Yields a job's index in ``jobs`` and its result, as they finish; ChildProcessError if a process was killed. Where
    this process is interrupted, jobs are given up where they are, and remove what they have not finished.
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
        resource_tracker.ensure_running()  # which would unblock the signal for the first worker
        # Ctrl-C reaches all processes of a terminal: workers, which inherit the mask, leave it to this one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            numbers: dict[Future[Result], int] = {
                pool.submit(_work, function, job): number for number, job in enumerate(jobs)
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in as_completed(numbers):
                result = future.result()
                bar.update()
                yield numbers[future], result
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"One of {workers} processes was killed, perhaps for want of memory; try fewer --workers."
            ) from error
        except (KeyboardInterrupt, Terminated, GeneratorExit):
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _GivenUp(BaseException):
    """Unwinds a job, so that what is unfinished is removed."""


def _work(function: Callable[[Job], Result], job: Job) -> Result:
    global _is_busy
    _is_busy = True
    try:
        return function(job)
    except _GivenUp:
        os._exit(1)
    finally:
        _is_busy = False


def _give_up(number: int, frame: object) -> None:
    if _is_busy:
        raise _GivenUp
    os._exit(1)


def _start_worker() -> None:
    """Keep a process to one core, and let it end when the main one is killed instead of waiting for work for ever."""
    signal.signal(signal.SIGTERM, _give_up)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if cv2 := sys.modules.get("cv2"):  # loaded by the job's module, where that works on images
        cv2.setNumThreads(1)
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for_connection([sentinel]), os._exit(1)), daemon=True).start()
