"""The Parquet builder in a process of its own that may be killed at a moment of time, or of its work."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq

from prepatching_scripts.build_parquet_sample_dataset import main

_fork = multiprocessing.get_context("fork")


def in_fork(function: Callable[[], int]) -> int:
    """Exit status of a function in a forked process."""
    child = _fork.Process(target=lambda: os._exit(function()))
    child.start()
    child.join()
    return child.exitcode


def run_builder(arguments: list[str]) -> int:
    """Exit status of the builder."""
    return in_fork(lambda: _main(arguments))


@contextmanager
def killer() -> Iterator[Callable[..., None]]:
    """Gives `kill(arguments, after=None, at_change=None)`, which kills the builder's main process only.

    It does so after some seconds, or just before or after its n-th change to a folder. Its workers are left to
    end by themselves, beside the next builder; those still there in the end are killed.
    """
    groups = []

    def kill(arguments: list[str], after: float | None = None, at_change: int | None = None) -> None:
        child = _fork.Process(target=lambda: os._exit(_main(arguments, at_change)))
        child.start()
        groups.append(child.pid)
        child.join(after)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()

    try:
        yield kill
    finally:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def _main(arguments: list[str], at_change: int | None = None) -> int:
    """The builder, with forked processes: spawned ones would spend seconds on their imports."""
    os.setpgid(0, 0)
    multiprocessing.get_context = lambda *_: _fork
    changes = 0

    def deadly(change: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **options: object) -> None:
            nonlocal changes
            if changes == at_change:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1
            change(*args, **options)
            if changes == at_change:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

        return run

    if at_change is not None:
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            setattr(Path, name, deadly(getattr(Path, name)))
    return main(arguments)


def build(sample_list: Path, output: Path, *options: str) -> int:
    """Exit status of the builder in this process."""
    return main([str(sample_list), "--output", str(output), "--workers", "1", *options])


def rows_of(folder: Path) -> list[dict]:
    """Rows of all shards of a folder."""
    return [row for shard in sorted(folder.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
