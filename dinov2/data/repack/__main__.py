"""Rewrite a Parquet dataset to small row groups, the image bytes unchanged: python -m dinov2.data.repack SRC DST

Training fetches whole row groups, so a dataset with one giant row group per file mixes poorly or takes much
memory. DST gets files of the same names. A file gets its name only when it is whole and was read back, so a run
that was stopped goes on where it was when the same command runs again. Files of SRC that cannot be read are
listed in DST/failures.jsonl.
"""

import argparse
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_connection
from pathlib import Path

from dinov2.data.parquet.footer import Footer, image_column
from dinov2.data.parquet.shard_footers import Unusable, read_footers
from dinov2.data.repack.shard import Layout, RepackJob, repack_shard
from dinov2.data.storage.base import LocalStorage, Storage, StoredFile
from dinov2.data.storage.locate import open_storage
from dinov2.utils.files import json_lines, write_text

logger = logging.getLogger("repack")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFRESH_SECONDS = 0.5


def repack_dataset(source: str, destination: Path, layout: Layout, workers: int = 1) -> int:
    """Write the files that are missing, and `failures.jsonl` if some cannot be read.

    Returns:
        Number of files that could not be read.

    Raises:
        FileNotFoundError: There is no such dataset.
        FileExistsError: The destination holds something else than a part of this result.
        ValueError: Source and destination overlap.
        OSError: A file cannot be written.
        RuntimeError: A process was killed from outside.
    """
    start = time.monotonic()
    storage = open_storage(source)
    files = storage.list_files()
    _refuse_overlap(source, storage, destination)
    _refuse_foreign_failures(destination / "failures.jsonl")
    destination.mkdir(parents=True, exist_ok=True)
    with _only_one(destination):
        jobs, failures = _plan(storage, files, destination, layout)
        finished = _finished(jobs, destination)
        missing = [job for job in jobs.values() if job.file.name not in finished]
        for job, reason in _run(missing, workers):
            if reason:
                failures.append(Unusable(job.file.name, reason))
                logger.error("cannot read '%s': %s", storage.locate(job.file.name), reason)
        records = [{"file": name, "reason": reason} for name, reason in sorted(failures)]
        if records:
            write_text(destination / "failures.jsonl", json_lines(records))
        else:  # no other file then lies among the shards, which some readers of folders would trip over
            (destination / "failures.jsonl").unlink(missing_ok=True)
    bad = {failure.name for failure in failures}
    _report([job for name, job in jobs.items() if name not in bad], finished, time.monotonic() - start)
    if failures:
        logger.error(
            "%d of %d files cannot be read, see %s", len(bad), len(files), destination / "failures.jsonl"
        )
    return len(bad)


def _plan(
    storage: Storage, files: Sequence[StoredFile], destination: Path, layout: Layout
) -> tuple[dict[str, RepackJob], list[Unusable]]:
    def job(file: StoredFile, footer: Footer) -> RepackJob:
        image = image_column(storage.locate(file.name), footer.schema)
        rows, groups = footer.metadata.num_rows, footer.metadata.num_row_groups
        return RepackJob(storage, file, image, rows, groups, footer.digest, layout, destination / file.name)

    planned = read_footers(storage, files, job)
    failures = [item for item in planned if isinstance(item, Unusable)]
    for name, reason in failures:
        logger.error("cannot read '%s': %s", storage.locate(name), reason)
    return {item.file.name: item for item in planned if isinstance(item, RepackJob)}, failures


def _finished(jobs: dict[str, RepackJob], destination: Path) -> set[str]:
    """Names of the files that an earlier run of the same command finished.

    Raises:
        FileExistsError: A Parquet file in the destination is none of these.
    """
    here = LocalStorage(str(destination))
    try:
        files = here.list_files()
    except FileNotFoundError:
        return set()

    def matches(file: StoredFile, footer: Footer) -> bool:
        return file.name in jobs and jobs[file.name].is_done(footer)

    for file, ours in zip(files, read_footers(here, files, matches), strict=True):
        if ours is not True:
            raise FileExistsError(
                f"'{destination / file.name}' was not made by this command from the present state of this source; "
                "give another destination or move it away"
            )
    return {file.name for file in files}


def _run(jobs: Sequence[RepackJob], workers: int) -> Iterator[tuple[RepackJob, str]]:
    """Repack in several processes, under a progress bar that follows the sizes of the files being written."""
    from tqdm import tqdm

    if not jobs:
        return
    total = sum(job.file.size for job in jobs)
    with (
        _executor(min(workers, len(jobs))) as pool,
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        running = {pool.submit(repack_shard, job): job for job in jobs}
        finished = 0
        try:
            while running:
                done, _ = wait(running, _REFRESH_SECONDS, FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    finished += job.file.size
                    yield job, future.result()
                written = sum(_written(job) for future, job in running.items() if future.running())
                bar.update(finished + written - bar.n)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {workers} processes was killed, perhaps for want of memory; try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _executor(workers: int) -> Executor:
    if workers <= 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([repack_shard.__module__])  # imported once, in memory that all share
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait_for_connection([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _written(job: RepackJob) -> int:
    try:
        return min(job.partial.stat().st_size, job.file.size)
    except FileNotFoundError:
        return 0


def _refuse_overlap(source: str, storage: Storage, destination: Path) -> None:
    """Refuse a destination whose files would be, or become, files of the source."""
    if not isinstance(storage, LocalStorage):
        return
    place, target = Path(storage.place).resolve(), destination.resolve()
    below = place in target.parents and not Path(source).expanduser().is_file()
    if target == place or target in place.parents or below:
        raise ValueError(
            f"source '{source}' and destination '{destination}' overlap; give a folder apart from it"
        )


def _refuse_foreign_failures(path: Path) -> None:
    """Refuse to replace a list that another program made."""
    if not path.exists():
        return
    try:
        ours = all(set(json.loads(line)) == {"file", "reason"} for line in path.read_text().splitlines())
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"'{path}' was not made by this command; give another destination or move it away"
        )


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second run off the folder; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise FileExistsError(f"another repack is writing into '{folder}'; wait for it or stop it") from error
    except OSError:
        logger.warning("'%s' cannot be locked; let no second repack write into it", folder)
    try:
        yield
    finally:
        os.close(handle)


def _report(jobs: Sequence[RepackJob], finished: set[str], seconds: float) -> None:
    new = [job for job in jobs if job.file.name not in finished]
    size, rows = sum(job.file.size for job in new), sum(job.rows for job in jobs)
    if not new:
        logger.info("nothing to do: %d files with %d rows are in place", len(jobs), rows)
        return
    after = sum(-(-job.rows // job.layout.row_group_rows) for job in jobs)
    logger.info(
        "%d files written, %d were there: %d rows, row groups %d -> %d; %.1f MB in %.1f s (%.0f MB/s)",
        len(new), len(finished), rows, sum(job.groups for job in jobs), after, size / 1e6, seconds,
        size / 1e6 / seconds,
    )  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.data.repack",
        description=__doc__.split(":")[0] + ".",
        epilog="Needs as much disk as SRC. Each process holds about three of SRC's pages besides 64 rows: some "
        "0.5 GB for giant row groups of 100 kB images. Ctrl-C ends after the files being written; the same command "
        "then goes on. Exit status: 0 done, 1 with a reason, 2 for wrong arguments.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder (with subfolders), glob or file; org/name[@revision] on the Hugging Face hub; s3:// ...",
    )
    parser.add_argument("destination", metavar="DST", help="folder for the new files, apart from SRC")
    parser.add_argument("--row-group-rows", type=int, default=64, help="rows of a row group (64)")
    parser.add_argument(
        "--compression", choices=("none", "snappy", "zstd", "lz4", "gzip"), default="none",
        help="codec of the image column (none: PNG and JPEG do not get smaller)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; default: one per core"
    )
    args = parser.parse_args(argv)
    for name in ("row_group_rows", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but it must be at least 1")
    if "://" in args.destination:
        parser.error(f"DST is '{args.destination}', but it must be a local folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 1 with a one-sentence reason."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    layout = Layout(args.row_group_rows, args.compression)
    try:
        failed = repack_dataset(args.source, Path(args.destination).expanduser(), layout, args.workers)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) in _FULL:
            logger.error("no room left in '%s'; make some, then run the same command again", args.destination)
        else:
            logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("stopped; the same command goes on from here")
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
