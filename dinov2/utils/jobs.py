"""What the slide tools share: jobs over several processes, and files that are whole or absent."""

import filecmp
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import cv2

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, unit: str
) -> Iterator[tuple[int, Result]]:
    """Run a function over jobs in several processes, with a progress bar.

    Args:
        function: importable by name, since the processes are spawned.
        jobs: picklable.
        workers: processes; 1 runs everything in this one.
        unit: what the progress bar counts.

    Yields:
        A job's place in `jobs` and its result, as they finish.

    Raises:
        RuntimeError: a process was killed from outside (memory, signal).
    """
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit=unit, disable=None) as bar:
        for place, result in _in_processes(function, jobs, min(workers, len(jobs))):
            bar.update()
            yield place, result


def _in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    if workers <= 1:
        yield from ((place, function(job)) for place, job in enumerate(jobs))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        places = {pool.submit(function, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"One of {workers} processes was killed, perhaps for want of memory; try fewer --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Keep a process to one core, and let it end when the main one is killed instead of waiting for work for ever."""
    cv2.setNumThreads(1)
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write text beside `path` and rename it, so that `path` is never half-written."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(lines)
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def place_files(contents: Mapping[Path, Iterable[str]], workplace: Path) -> None:
    """Write several texts whole, in order, and only then give them their names, the last one first.

    A kill in between leaves some of them placed; called again with the same contents, it places the rest.

    Args:
        contents: lines of each file.
        workplace: folder on the same file system for the unfinished files.

    Raises:
        FileExistsError: a file exists with other contents.
    """
    finished = {}
    for path, lines in contents.items():
        finished[path] = workplace / path.name
        write_whole(finished[path], lines)
    for path, file in finished.items():
        if path.exists() and not filecmp.cmp(path, file, shallow=False):
            raise FileExistsError(f"'{path}' exists already with other contents; move it away.")
    for path, file in reversed(finished.items()):
        file.replace(path)


def commit(partial: Path, path: Path) -> None:
    """Bring a finished file to the disk and give it its name."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def json_lines(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One JSON object per line."""
    return (json.dumps(record) + "\n" for record in records)
