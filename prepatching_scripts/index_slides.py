"""Index the tiles of a collection of slides once, so that readers need not parse the slides.

FOLDER/tiles.index holds where all tiles lie, about 12 bytes for each; `online.slides` takes it in place of a folder.
With --zarr, FOLDER/zarr/ holds a JSON file per slide that opens it as Zarr arrays. A run that was stopped goes on
where it was; slides that are indexed and have kept their size are not parsed again.
"""

import logging
from collections import Counter
from functools import partial
from pathlib import Path

from dinov2.data.slides.find import find_slides
from dinov2.data.slides.index import TileIndexes, complete_tile_index, write_zarr
from dinov2.data.slides.resolution import MppTable, log_notes, read_mpp_table
from dinov2.utils.cli import DONE, FAILURES, add_options, command_parser, log_failures, run_command, told_failures
from dinov2.utils.files import json_lines, remove_leftovers, write_text
from dinov2.utils.jobs import run_jobs

logger = logging.getLogger("index_slides")

INDEX_NAME, FAILURES_NAME = "tiles.index", "failures.jsonl"


def index_collection(
    source: str, output: Path, table: MppTable | None, root: Path | None, workers: int, zarr: bool
) -> tuple[int, int]:
    """Write or complete the index of a collection in a folder, `failures.jsonl`, and Zarr references if asked for.

    Returns:
        Number of slides, and of slides that failed.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it holds no slide, or two slides would share one Zarr file.
    """
    rows = find_slides(source, mpp_table=table, slide_root=root).slides
    keys = {row.path: row.key for row in rows}
    if zarr and len(set(keys.values())) < len(keys):
        twice = Counter(keys.values()).most_common(1)[0][0]
        raise ValueError(f"Two slides of '{source}' are named '{twice}'; give their folder instead for --zarr.")
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output, FAILURES_NAME)
    index = output / INDEX_NAME
    fresh, failures = complete_tile_index(index, {row.path: row.mpp for row in rows}, workers)
    if zarr:
        files = ((slide, output / "zarr" / f"{keys[slide]}.json") for slide in TileIndexes(index))
        jobs = [(slide, file) for slide, file in files if slide in fresh or not file.exists()]
        for number, reason in run_jobs(partial(write_zarr, index), jobs, workers, "file"):
            if reason:
                failures[jobs[number][0]] = reason
    indexes = TileIndexes(index)
    log_notes(logger, ((slide, indexes.outline(slide).resolution.notes) for slide in indexes if slide in fresh))
    records = [{"slide": slide, "reason": failures[slide]} for slide in keys if slide in failures]
    write_text(output / FAILURES_NAME, json_lines(records))
    log_failures(logger, {record["slide"]: record["reason"] for record in records}, output / FAILURES_NAME)
    logger.info("%d of %d slides are in %s", len(keys) - len(records), len(keys), index)
    return len(keys), len(records)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit status of `dinov2.utils.cli`."""
    parser = command_parser(
        "python prepatching_scripts/index_slides.py",
        __doc__.splitlines()[0],
        "/data/slides --output index --workers 8",
    )
    parser.add_argument("slides", help="folder (with subfolders), text or .csv file of paths or URLs, slide, or URL")
    parser.add_argument("--output", type=Path, required=True, help=f"folder of {INDEX_NAME}")
    add_options(parser, "--slide-root", "--mpp-file")
    parser.add_argument("--zarr", action="store_true", help="write fsspec references that open slides as Zarr")
    add_options(parser, "--workers")
    parser.add_argument(
        "--max-failed-share", type=float, default=0.05, help="exit 1 if more of the slides fail (%(default)s)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> int:
        table = read_mpp_table(args.mpp_file) if args.mpp_file else None
        total, failed = index_collection(args.slides, args.output, table, args.slide_root, args.workers, args.zarr)
        if failed <= args.max_failed_share * total:
            return DONE
        logger.error(told_failures(failed, total, "slides", args.output / FAILURES_NAME))
        return FAILURES

    return run_command(body, logger, resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
