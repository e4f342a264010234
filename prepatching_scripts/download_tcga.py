"""Download slides from the Genomic Data Commons (GDC) into a folder, verified by size and md5.

The same command again goes on where the last one ended, however that was.
"""

import argparse
import errno
import json
import logging
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dinov2.utils.cli import DONE, FAILURES, add_options, at_least, command_parser, run_command, told_failures
from dinov2.utils.files import json_lines, remove_leftovers, write_json, write_text
from prepatching_scripts.gdc.download import Downloads, Stopped, part_of
from prepatching_scripts.gdc.manifest import GdcFile, manifest_lines, read_manifest
from prepatching_scripts.gdc.query import Gdc, slide_filter

logger = logging.getLogger("download_tcga")

FOUND, FAILED = "gdc_manifest.txt", "failures.jsonl"
META = f"{FOUND}.meta.json"
_WRITTEN = (FOUND, META, FAILED)
STRATEGIES = {"diagnostic": "Diagnostic Slide", "tissue": "Tissue Slide"}
Job = tuple[GdcFile, Path]


def find_or_reuse(gdc: Gdc, filters: dict[str, Any], folder: Path) -> Path:
    """Give the manifest of a filter, asking the server only if `folder` does not hold it.

    Raises:
        FileExistsError: if the folder holds the manifest of something else.
        ValueError: if the filter describes no file.
    """
    manifest, meta = folder / FOUND, folder / META
    wanted = {"endpoint": gdc.endpoint, "filters": filters}
    if manifest.exists():
        known = json.loads(meta.read_text()) if meta.exists() else {}
        if {key: known.get(key) for key in wanted} != wanted:
            raise FileExistsError(
                f"'{manifest}' was not made by this filter; use it by --manifest, or give another --output."
            )
        return manifest
    files = gdc.find(filters)
    if not files:
        raise ValueError(f"{gdc.endpoint} has no file for {json.dumps(filters)}; check --project.")
    write_json(meta, {**wanted, "num_files": len(files), "num_bytes": sum(file.size for file in files)})
    write_text(manifest, manifest_lines(files))
    return manifest


def lay_out(files: Sequence[GdcFile], folder: Path, flat: bool) -> list[Job]:
    """Give each file its path: <id>/<name>, or <name> if flat; ValueError if two files would have one path."""
    if not flat:
        return [(file, folder / file.id / file.name) for file in files]
    taken = {name.casefold(): "this tool" for name in _WRITTEN}
    for file in files:
        if other := taken.get(file.name.casefold()):
            raise ValueError(f"'{file.name}' is the name of {file.id} and of {other}; leave out --flat.")
        taken[file.name.casefold()] = file.id
    return [(file, folder / file.name) for file in files]


def check_space(jobs: Sequence[Job], folder: Path, ignore: bool) -> None:
    """Compare the bytes that are missing with the space that is left; OSError if they do not fit, unless ignored."""
    total = missing = sum(file.size for file, _ in jobs)
    for file, path in jobs:
        part = part_of(path)
        if path.exists():
            missing -= file.size if path.stat().st_size == file.size else 0
        elif part.exists():
            missing -= min(file.size, part.stat().st_size)
    free = shutil.disk_usage(folder).free
    logger.info("%d files of %.3f GB, of which %.3f GB are missing", len(jobs), total / 1e9, missing / 1e9)
    if missing > free:
        message = f"'{folder}' has {free / 1e9:.3f} GB free, but {missing / 1e9:.3f} GB are missing"
        if not ignore:
            raise OSError(f"{message}; make room, or start all the same by --ignore-space.")
        logger.warning("%s; it will end when the disk is full.", message)


def fetch_all(downloads: Downloads, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Any]]:
    """Fetch files by several threads; yields each with what `fetch` returned or raised, as they finish."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        with suppress(queue.Empty, Stopped):
            while not downloads.stop.is_set():
                job = waiting.get_nowait()
                try:
                    done.put((job, downloads.fetch(*job)))
                except Stopped:
                    raise
                except Exception as error:
                    done.put((job, error))

    # Daemons, unlike the threads of an executor: one that waits for a silent server does not hold up the end.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        finished = 0
        while finished < len(jobs):
            # Awake every second: an interrupt that another thread's wait has received reaches this one only then.
            with suppress(queue.Empty):
                yield done.get(timeout=1.0)
                finished += 1
    finally:
        downloads.stop.set()
        for thread in threads:
            thread.join(timeout=2.0)


def download(gdc: Gdc, jobs: Sequence[Job], folder: Path, stop: threading.Event, args: argparse.Namespace) -> int:
    """Fetch everything and write failures.jsonl; returns how many files failed, OSError if the disk is full."""
    lock, failed, finished, fetched = threading.Lock(), [], 0, 0
    total = sum(file.size for file, _ in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar, logging_redirect_tqdm():

        def progress(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        limit = args.limit_mbps * 1e6 / 8 if args.limit_mbps else None
        downloads = Downloads(gdc, stop, progress, limit, args.verify, args.redownload)
        try:
            with closing(fetch_all(downloads, jobs, args.workers)) as outcomes:
                for (file, path), outcome in outcomes:
                    if not isinstance(outcome, Exception):
                        finished, fetched = finished + 1, fetched + outcome
                    elif not isinstance(outcome, OSError):
                        raise outcome
                    elif outcome.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise OSError(
                            f"'{folder}' is full, {finished} of {len(jobs)} files are whole; make room and run the "
                            "same command again to go on."
                        ) from outcome
                    else:
                        failed.append({"id": file.id, "file": str(path), "reason": str(outcome)})
                        logger.error("%s: %s", file.name, outcome)
        finally:
            with suppress(OSError):  # a full disk, which is told of elsewhere
                write_text(folder / FAILED, json_lines(failed))
            logger.info("%d of %d files are in %s, %d of them new", finished, len(jobs), folder, fetched)
    return len(failed)


def read_token(path: Path | None) -> str:
    """Read an access token from a file, empty if there is none to read; ValueError if it cannot be a token."""
    token = path.read_text(encoding="utf-8", errors="replace").strip() if path else ""
    if path and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(f"'{path}' holds no token; one line of letters and digits is expected.")
    return token


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit status of `dinov2.utils.cli`."""
    parser = command_parser(
        "python prepatching_scripts/download_tcga.py",
        __doc__.splitlines()[0],
        "--filter --project TCGA-BRCA --output /data/TCGA",
        "--manifest gdc_manifest.txt --output /data/TCGA",
    )
    what, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    what.add_argument("--manifest", type=Path, help="manifest from the GDC portal or its API")
    listed = f"TCGA's open-access SVS slides; the list is kept as {FOUND} in the output folder"
    what.add_argument("--filter", action="store_true", help=listed)
    add("--project", nargs="+", default=[], help="with --filter: TCGA-BRCA ... (all)")
    add("--slides", nargs="+", choices=STRATEGIES, default=["diagnostic"], help="with --filter (diagnostic)")
    add("--output", type=Path, required=True, help="folder; files land in <id>/<filename>")
    add("--flat", action="store_true", help="files land in the folder itself")
    add_options(parser, "--workers", default=4, help="files at a time (%(default)s)")
    add("--limit-mbps", type=float, help="megabits per second, all together; default: no limit")
    add("--verify", action="store_true", help="read files that are there and check their md5")
    add("--redownload", action="store_true", help="put wrong files aside as <file>.bad-N and fetch them anew")
    add("--token-file", type=Path, help="access token for files of controlled access")
    add("--endpoint", default="https://api.gdc.cancer.gov", help="(%(default)s)")
    add("--attempts", type=at_least(1), default=8, help="requests in a row without progress (8)")
    add("--ignore-space", action="store_true", help="start though the disk is too small")
    args = parser.parse_args(argv)
    if args.limit_mbps is not None and not args.limit_mbps > 0:
        parser.error(f"--limit-mbps is {args.limit_mbps}, but it must be above 0")
    if args.project and args.manifest:
        parser.error("--project goes with --filter; a manifest says itself which files")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder, stop = args.output, threading.Event()

    def body() -> int:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, *_WRITTEN)
        gdc = Gdc(args.endpoint, read_token(args.token_file), args.attempts, sleep=stop.wait)
        filters = slide_filter([STRATEGIES[kind] for kind in args.slides], args.project)
        manifest = args.manifest or find_or_reuse(gdc, filters, folder)
        jobs = lay_out(read_manifest(manifest), folder, args.flat)
        check_space(jobs, folder, args.ignore_space)
        failed = download(gdc, jobs, folder, stop, args)
        if not failed:
            return DONE
        logger.error(told_failures(failed, len(jobs), "files", folder / FAILED))
        return FAILURES

    return run_command(body, logger, resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
