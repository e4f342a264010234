"""Rewrite a Parquet dataset to small row groups, the image bytes unchanged: python -m dinov2.data.repack SRC DST

Training fetches whole row groups, so a dataset with one oversized row group per file mixes poorly or takes much
memory. DST gets files of the same names, each only when it is whole and was read back, so a run that was stopped goes
on when the same command runs again. Files of SRC that cannot be read are listed in DST/failures.jsonl.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from dinov2.data.parquet.footer import Footer, Foreign, Unusable, image_column, read_footers
from dinov2.data.repack.shard import SOURCE_KEY, RepackJob, repack_shard
from dinov2.data.storage.base import LocalStorage, Storage, StoredFile
from dinov2.data.storage.locate import NAMES, open_storage
from dinov2.utils.cli import DONE, FAILURES, add_options, at_least, command_parser, local_folder, run_command
from dinov2.utils.files import check_apart, check_report, json_lines, leftovers, locked, naming_full_disk, write_text
from dinov2.utils.jobs import run_jobs

logger = logging.getLogger("repack")

_FAILURES = "failures.jsonl"


def repack_dataset(
    source: str, destination: Path, row_group_rows: int, compression: str, workers: int, named: str = ""
) -> int:
    """Write the files that are missing, and `failures.jsonl`; return how many of the source cannot be read.

    ``named`` is a name that the image column may have besides the known ones; files without images are left out.
    FileExistsError if the destination holds something else or is being written to, ValueError if it overlaps SRC or
    none of its files holds images.
    """
    start = time.monotonic()
    storage = open_storage(source)
    files = storage.list_files()
    _check_destination(source, storage, destination)
    failure_list = destination / _FAILURES
    destination.mkdir(parents=True, exist_ok=True)
    with locked(destination, busy=f"another repack is writing into '{destination}'; wait for it or stop it"):
        failures: dict[str, str] = {}

        def fail(name: str, reason: str) -> None:
            failures[name] = reason
            logger.error("cannot read '%s': %s", storage.locate(name), reason)

        def plan(file: StoredFile, footer: Footer) -> RepackJob:
            image = image_column(storage.locate(file.name), footer.schema, named)
            found = image, footer.metadata.num_rows, footer.metadata.num_row_groups, footer.digest
            return RepackJob(storage, file, *found, destination / file.name, row_group_rows, compression)

        planned = _without_foreign(read_footers(storage, files, plan))
        jobs = {item.file.name: item for item in planned if isinstance(item, RepackJob)}
        for item in planned:
            if isinstance(item, Unusable):
                fail(*item)
        finished = _finished(jobs, destination)
        missing = [job for name, job in jobs.items() if name not in finished]
        for folder in {job.destination.parent for job in missing}:
            for _, partial in leftovers(folder):  # of a run that was killed
                partial.unlink()
        for number, reason in run_jobs(repack_shard, missing, workers, "file"):
            if reason:
                fail(missing[number].file.name, reason)
        if failures:
            write_text(failure_list, json_lines({"file": name, "reason": failures[name]} for name in sorted(failures)))
        else:  # no other file then lies among the shards, which some readers of folders would trip over
            failure_list.unlink(missing_ok=True)
    done = [job for name, job in jobs.items() if name not in failures]
    _report(done, finished, time.monotonic() - start)
    if failures:
        logger.error("%d of %d files cannot be read, see %s", len(failures), len(files), failure_list)
    return len(failures)


def _without_foreign(planned: Sequence[RepackJob | Unusable]) -> list[RepackJob | Unusable]:
    """Leave out files without images, as training does, and say which; ValueError if there is nothing else."""
    foreign = [item for item in planned if isinstance(item, Foreign)]
    if foreign and len(foreign) == len(planned):
        raise ValueError(foreign[0].reason)
    if foreign:
        words = "left out %d of %d files, which hold no images: %s"
        logger.warning(words, len(foreign), len(planned), ", ".join(item.name for item in foreign))
    return [item for item in planned if not isinstance(item, Foreign)]


def _report(done: Sequence[RepackJob], finished: set[str], seconds: float) -> None:
    rows, size = sum(job.rows for job in done), sum(job.file.size for job in done if job.file.name not in finished)
    if len(done) == len(finished):
        logger.info("nothing to do: %d files with %d rows are in place", len(done), rows)
        return
    before, after = sum(job.groups for job in done), sum(-(-job.rows // job.row_group_rows) for job in done)
    words = "%d files written, %d were there: %d rows, row groups %d -> %d; %.1f MB in %.1f s (%.0f MB/s)"
    counts = len(done) - len(finished), len(finished), rows, before, after
    logger.info(words, *counts, size / 1e6, seconds, size / 1e6 / seconds)


def _finished(jobs: dict[str, RepackJob], destination: Path) -> set[str]:
    """Names of the files that an earlier run of the same command finished; FileExistsError if there are others."""
    here = LocalStorage(str(destination))
    try:
        files = here.list_files()
    except FileNotFoundError:
        return set()

    def is_ours(file: StoredFile, footer: Footer) -> bool:
        job, found = jobs.get(file.name), footer.metadata
        return job is not None and (found.metadata or {}).get(SOURCE_KEY) == job.identity and found.num_rows == job.rows

    for file, ours in zip(files, read_footers(here, files, is_ours), strict=True):
        if ours is not True:
            found = f"'{destination / file.name}' was not made by this command from the present state of this source"
            raise FileExistsError(f"{found}; give another destination or move it away")
    return {file.name for file in files}


def _check_destination(source: str, storage: Storage, destination: Path) -> None:
    """Refuse a destination that overlaps the source, or has a list of failures that another program made."""
    if isinstance(storage, LocalStorage):
        check_apart(source, storage.location, destination)
    check_report(destination / _FAILURES, {"file", "reason"})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python -m dinov2.data.repack",
        __doc__.split(":")[0] + ".",
        "/data/tiles /data/tiles_repacked --workers 8",
        epilog="Needs as much disk as SRC. Each process holds about three of SRC's pages besides 64 rows: some "
        "0.5 GB for oversized row groups of 100 kB images. Ctrl-C ends after the files being written; the same "
        "command then goes on. Exit status: 0 done, 1 done but some files cannot be read, 2 not done, with the reason.",
    )
    parser.add_argument("source", metavar="SRC", help=NAMES)
    parser.add_argument("destination", metavar="DST", type=local_folder, help="folder for the files, apart from SRC")
    parser.add_argument("--row-group-rows", type=at_least(1), default=64, help="rows of a row group (64)")
    codecs = ("none", "snappy", "zstd", "lz4", "gzip")
    text = "codec of the image column (none: PNG and JPEG do not get smaller)"
    parser.add_argument("--compression", choices=codecs, default="none", help=text)
    parser.add_argument("--image-column", metavar="NAME", default="", help="as data.image_column")
    add_options(parser, "--workers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `dinov2.utils.cli.run_command`."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> int:
        with naming_full_disk(args.destination):
            where = args.source, args.destination
            layout = args.row_group_rows, args.compression
            return FAILURES if repack_dataset(*where, *layout, args.workers, args.image_column) else DONE

    return run_command(body, logger, resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
