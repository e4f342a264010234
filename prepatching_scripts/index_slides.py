"""Index the tiles of a collection of slides once, so that readers need not parse the slides.

FOLDER/tiles.index holds the places of all tiles, about 12 bytes for each; with --zarr, FOLDER/zarr/ holds a JSON
file per slide that opens it as Zarr arrays. A run that was stopped goes on where it was; slides that are indexed
and have kept their size are not parsed again.
"""

import argparse
import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dinov2.data.slides.blocks import TileIndex, index_slide
from dinov2.data.slides.collection import (
    append_record,
    finish_records,
    load_tile_indexes,
    start_records,
    whole_records,
)
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.find import SLIDE_SUFFIXES, find_slides
from dinov2.data.slides.ranges import is_remote
from dinov2.data.slides.resolution import MppTable, read_mpp_table
from dinov2.data.slides.virtual_zarr import zarr_references
from dinov2.utils.files import commit, json_lines, write_text
from dinov2.utils.jobs import run_jobs

logger = logging.getLogger("index_slides")

INDEX_NAME, FAILURES_NAME, ZARR_FOLDER = "tiles.index", "failures.jsonl", "zarr"


@dataclass(frozen=True)
class IndexJob:
    """A slide to parse, and the mpp that its user gives."""

    slide: str
    mpp: float | None


@dataclass(frozen=True)
class ZarrJob:
    """A slide of an index, and the JSON file to write for it."""

    index: Path
    slide: str
    output: Path


def parse_slide(job: IndexJob) -> TileIndex | str:
    """Index one slide, or say why it cannot be."""
    try:
        return index_slide(job.slide, job.mpp)
    except SlideError as error:
        return error.detail
    except OSError as error:
        return str(error)


def write_zarr(job: ZarrJob) -> str:
    """Write one slide's references; returns why not, "" where they are written."""
    try:
        references = zarr_references(_loaded(job.index)[job.slide])
        job.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(job.output, [json.dumps(references)])
    except (OSError, ValueError) as error:
        return str(error)
    return ""


_loaded = lru_cache(1)(load_tile_indexes)


def list_slides(source: str) -> dict[str, str]:
    """Slides and their keys, as `find_slides` gives them; `source` or the lines of a list may be URLs."""
    if is_remote(source):
        return {source: source.rpartition("/")[2]}
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in SLIDE_SUFFIXES:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        places = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if any(map(is_remote, places)):
            places = [place if is_remote(place) else os.path.abspath(place) for place in places]
            return {place: place.rpartition("/")[2] for place in places}
    return dict(find_slides(path).slides)


def index_collection(
    source: str, output: Path, table: MppTable | None = None, workers: int = 1, zarr: bool = False
) -> tuple[int, int]:
    """Write or complete the index of a collection, `failures.jsonl`, and Zarr references if asked for.

    Args:
        source: folder, slide, URL, or text file of paths and URLs.
        output: folder to write to.
        table: mpp of slides that do not say theirs.
        workers: processes.
        zarr: write references.

    Returns:
        Number of slides, and of slides that failed.

    Raises:
        FileNotFoundError: there is no slide.
        ValueError: two slides would share one Zarr file.
    """
    slides = list_slides(source)
    if zarr and len(set(slides.values())) < len(slides):
        names = list(slides.values())
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two slides of '{source}' are named '{twice}'; give their folder instead for --zarr."
        )
    output.mkdir(parents=True, exist_ok=True)
    given = {slide: table.get(slide) if table else None for slide in slides}
    fresh, failures = _complete(output / INDEX_NAME, given, workers)
    if zarr:
        indexed = load_tile_indexes(output / INDEX_NAME)
        files = {
            slide: output / ZARR_FOLDER / f"{slides[slide]}.json" for slide in indexed if slide in slides
        }
        jobs = [
            ZarrJob(output / INDEX_NAME, slide, file)
            for slide, file in files.items()
            if slide in fresh or not file.exists()
        ]
        for place, reason in run_jobs(write_zarr, jobs, workers, "file"):
            if reason:
                failures[jobs[place].slide] = reason
    records = [{"slide": slide, "reason": failures[slide]} for slide in slides if slide in failures]
    write_text(output / FAILURES_NAME, json_lines(records))
    logger.info("%d of %d slides are in %s", len(slides) - len(records), len(slides), output / INDEX_NAME)
    return len(slides), len(records)


def _complete(path: Path, given: dict[str, float | None], workers: int) -> tuple[set[str], dict[str, str]]:
    """Write an index of the slides; returns those that were parsed now, and why others could not be."""
    partial = path.with_name(f"{path.name}.part")
    starts, end = {}, 0
    for start, end, index in whole_records(partial):  # noqa: B007
        if _still_holds(index, given):
            starts[index.path] = start
    fresh, failures = set(starts), {}
    with partial.open("r+b" if end else "wb") as file:
        file.seek(end)
        file.truncate()
        if not end:
            start_records(file)
        for _, _, index in whole_records(path):
            if index.path not in starts and _still_holds(index, given):
                starts[index.path] = append_record(file, index)
        jobs = [IndexJob(slide, mpp) for slide, mpp in given.items() if slide not in starts]
        for place, result in run_jobs(parse_slide, jobs, workers, "slide"):
            if isinstance(result, str):
                failures[jobs[place].slide] = result
            else:
                starts[result.path] = append_record(file, result)
                fresh.add(result.path)
        finish_records(file, {slide: starts[slide] for slide in given if slide in starts})
    commit(partial, path)
    return fresh, failures


def _still_holds(index: TileIndex, given: dict[str, float | None]) -> bool:
    if index.path not in given:
        return False
    mpp = given[index.path]
    same_mpp = index.mpp_source in ("slide", "appmag") or index.mpp == mpp
    try:
        return same_mpp and (is_remote(index.path) or os.stat(index.path).st_size == index.size)
    except OSError:
        return False


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", help="folder (with subfolders), text file of paths or URLs, slide, or URL")
    parser.add_argument("--output", type=Path, required=True, help=f"folder of {INDEX_NAME}")
    parser.add_argument(
        "--mpp-file", type=Path, help="CSV slide,mpp: um per level-0 px of slides that do not say"
    )
    parser.add_argument(
        "--zarr", action="store_true", help="write fsspec references that open slides as Zarr"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    parser.add_argument(
        "--max-failed-share", type=float, default=0.05, help="exit 1 above this share of failed slides (0.05)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, but it must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 1 with a one-sentence reason."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        table = read_mpp_table(args.mpp_file) if args.mpp_file else None
        total, failed = index_collection(args.slides, args.output, table, args.workers, args.zarr)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    if failed > args.max_failed_share * total:
        logger.error("%d of %d slides failed, see %s.", failed, total, args.output / FAILURES_NAME)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
