"""Pack images into Parquet shards, their bytes unchanged: python -m dinov2.data.pack SRC DST

SRC is a folder of images, a list of them, tar shards, zip archives, HDF5 files, or what else training reads but slides
that are drawn without end. It is worth it for many single files: over a network, where each takes a request of its own
and shards one for 64, and from 100,000 on, where each start lists them. Pixels that are stored as such become PNG. A
run that was stopped goes on when the same command runs again; shards get their names when they are whole.
"""

import argparse
import json
import logging
import math
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.kinds import open_source
from dinov2.data.pack.shard import SOURCE_KEY, PackJob, pack_shard
from dinov2.data.source import Source
from dinov2.extensions import SOURCES
from dinov2.utils.cli import (
    DONE,
    FAILURES,
    add_options,
    at_least,
    command_parser,
    local_folder,
    log_failures,
    run_command,
)
from dinov2.utils.files import check_apart, check_report, json_lines, leftovers, locked, naming_full_disk, write_text
from dinov2.utils.jobs import run_jobs

logger = logging.getLogger("pack")

_FAILURES = "failures.jsonl"


def pack_dataset(source: Source, destination: Path, shard_bytes: int, workers: int) -> int:
    """Write the shards that are missing, and `failures.jsonl`; return how many images cannot be read.

    FileExistsError if the destination holds something else or is being written to.
    """
    started = time.monotonic()
    per_shard = max(1, math.ceil(len(source.group_rows) / max(1, math.ceil(source.group_bytes.sum() / shard_bytes))))
    firsts = range(0, len(source.group_rows), per_shard)
    identity = json.dumps({"fingerprint": source.fingerprint, "groups": per_shard}, sort_keys=True).encode()
    check_report(destination / _FAILURES, {"tile", "reason"})
    destination.mkdir(parents=True, exist_ok=True)
    with locked(destination, busy=f"another pack is writing into '{destination}'; wait for it or stop it"):
        for _, partial in leftovers(destination):  # of a run that was killed
            partial.unlink()
        names = [f"tiles-{number:05d}-of-{len(firsts):05d}.parquet" for number in range(len(firsts))]
        there = _finished(destination, set(names), identity)
        ends = (min(first + per_shard, len(source.group_rows)) for first in firsts)
        jobs = [
            PackJob(source, range(first, end), destination / name, identity)
            for first, end, name in zip(firsts, ends, names, strict=True)
        ]
        missing = [job for job in jobs if job.path.name not in there]
        lost = _read_failures(destination / _FAILURES) if there else {}
        for _, failed in run_jobs(pack_shard, missing, workers, "shard"):
            if failed:  # listed at once, since a run that goes on does not look at finished shards again
                lost |= failed
                write_text(destination / _FAILURES, json_lines({"tile": t, "reason": lost[t]} for t in sorted(lost)))
    seconds = time.monotonic() - started
    size = sum((destination / name).stat().st_size for name in names)
    words = "%d shards written, %d were there: %d tiles, %.1f MB in %.1f s"
    logger.info(words, len(missing), len(there), source.num_rows - len(lost), size / 1e6, seconds)
    if lost:
        log_failures(logger, lost, destination / _FAILURES)
        logger.error("%d of %d images cannot be read, see %s", len(lost), source.num_rows, destination / _FAILURES)
    return len(lost)


def _read_failures(path: Path) -> dict[str, str]:
    """Images that the shards which are there lack, by name."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {item["tile"]: item["reason"] for item in map(json.loads, lines)}


def _finished(destination: Path, names: set[str], identity: bytes) -> set[str]:
    """Shards that an earlier run of the same command finished; FileExistsError if there are others."""
    found = {path.name: path for path in destination.glob("*.parquet")}
    for name, path in found.items():
        try:
            ours = name in names and (pq.read_schema(path).metadata or {}).get(SOURCE_KEY) == identity
        except (pa.ArrowException, OSError):
            ours = False
        if not ours:
            made = f"'{path}' was not made by this command from the present state of this source"
            raise FileExistsError(f"{made}; give another destination or move it away")
    return set(found)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python -m dinov2.data.pack",
        __doc__.partition(": python")[0] + ".\n\n" + __doc__.partition("\n\n")[2],
        "/data/images /data/tiles --workers 8",
        epilog="Exit status: 0 done, 1 done but some images cannot be read, 2 not done, with the reason.",
    )
    parser.add_argument("source", metavar="SRC", help="what data.path would name")
    parser.add_argument("destination", metavar="DST", type=local_folder, help="folder for the shards")
    parser.add_argument("--kind", choices=("auto", *SOURCES), default="auto", help="what SRC is, where not recognised")
    parser.add_argument("--groups-file", metavar="FILE", default="", help="as data.groups_file")
    parser.add_argument("--patient-pattern", metavar="REGEX", default="", help="as data.patient_pattern")
    parser.add_argument("--image-column", metavar="NAME", default="", help="as data.image_column")
    parser.add_argument("--shard-mb", type=at_least(1), default=500, help="megabytes of images of a shard (500)")
    add_options(parser, "--workers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `dinov2.utils.cli.run_command`."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> int:
        told = {name: getattr(args, name) for name in ("groups_file", "patient_pattern", "image_column")}
        source = open_source(args.source, args.kind, **told)[1]
        if os.path.exists(location := getattr(source, "location", "")):
            check_apart(args.source, location, args.destination)
        with naming_full_disk(args.destination):
            lost = pack_dataset(source, args.destination, args.shard_mb * 10**6, args.workers)
        return FAILURES if lost else DONE

    return run_command(body, logger, resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
