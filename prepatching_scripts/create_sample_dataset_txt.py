"""Draw tissue tiles from slides and list them, one `path x y level` per line (x, y in level-0 pixels).

With --mpp or --magnification a line is `path x y level mpp_x mpp_y` and the tile is cut at that mpp. Which
tiles a slide gives depends on the seed and on its path below the input folder, not on other slides or on the
number of processes. A command that was stopped goes on where it was when it runs again.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.prepare.draw import Sampling, SlideDraw, SlideJob
from dinov2.data.prepare.parts import make_part
from dinov2.data.prepare.preview import INDEX, preview_mark, write_index
from dinov2.data.slides.find import FoundSlides, find_slides
from dinov2.data.slides.resolution import PLAUSIBLE_MPP, log_notes, read_mpp_table
from dinov2.data.slides.sample_list import COLUMNS
from dinov2.data.slides.tissue import TissueRule, add_rule_options, log_doubts, rule_of_options
from dinov2.utils.cli import DONE, FAILURES, add_options, command_parser, log_failures, run_command, told_failures
from dinov2.utils.files import json_lines, leftovers, write_new
from dinov2.utils.jobs import run_jobs

logger = logging.getLogger("create_sample_dataset_txt")

PARTS_VERSION = 2  # of what a slide gives under given options; raise it when that changes


def create_sample_list(
    source: Path,
    output: Path,
    sampling: Sampling,
    workers: int,
    mpp_file: Path | None,
    preview: Path | None,
    slide_root: Path | None = None,
) -> tuple[int, int]:
    """Write the list, `<output>.meta.json` and `<output>.failures.jsonl`, and a PNG per slide and a page of them into
    `preview`.

    Returns:
        Number of slides, and of slides that failed.

    Raises:
        FileExistsError: if one of the three files exists, or a file in `preview` would be replaced that is none.
        FileNotFoundError: if there is no `source` or no `mpp_file`.
        ValueError: if there is no slide, or the `mpp_file` is malformed.
        OSError: if something cannot be written.
    """
    meta, failures = (output.with_name(output.name + ending) for ending in (".meta.json", ".failures.jsonl"))
    options = json.dumps([PARTS_VERSION, asdict(sampling)], sort_keys=True).encode()
    parts = output.with_name(f".{output.name}.parts-{hashlib.blake2b(options, digest_size=8).hexdigest()}")
    for path in (output, meta, failures):
        if path.exists() and not parts.is_dir():  # else an earlier run of this command was placing them
            raise FileExistsError(f"'{path}' exists already; give another --output or move it away.")
    table = None if mpp_file is None else read_mpp_table(mpp_file)
    found = find_slides(source, mpp_table=table, slide_root=slide_root)
    pictures = _pictures(found, preview)
    parts.mkdir(parents=True, exist_ok=True)
    finals = {output, meta, failures, *filter(None, pictures)}
    for folder in {path.parent for path in finals}:
        for name, partial in leftovers(folder):
            if folder / name in finals:
                partial.unlink(missing_ok=True)
    jobs = [
        (SlideJob(row.path, row.key, sampling, row.mpp), parts, picture)
        for row, picture in zip(found.slides, pictures, strict=True)
    ]
    made = [draw for _, draw in sorted(run_jobs(make_part, jobs, workers, "slide"), key=itemgetter(0))]
    log_doubts((row.path, draw.doubt) for row, draw in zip(found.slides, made, strict=True))
    unseen = [draw.preview_failure for draw in made if draw.preview_failure]
    if unseen:
        logger.warning("%d previews could not be drawn; the first: %s", len(unseen), unseen[0])
    if preview is not None:
        missing = [draw.preview_failure or ("" if picture.exists() else draw.failure)
                   for draw, picture in zip(made, pictures, strict=True)]  # fmt: skip
        names = [picture.relative_to(preview).as_posix().removesuffix(".png") for picture in pictures]
        write_index(preview, list(zip(names, missing, strict=True)))
        logger.info("Previews: %s", preview / INDEX)
    log_notes(logger, ((row.path, draw.notes) for row, draw in zip(found.slides, made, strict=True)))

    digest = hashlib.sha256()
    lines, description = _lines(found, made, sampling, digest), _description(found, made, sampling, digest)
    write_new({output: lines, meta: description, failures: json_lines(_failures(found, made))})
    shutil.rmtree(parts)
    reasons = {row.path: draw.failure for row, draw in zip(found.slides, made, strict=True) if draw.failure}
    log_failures(logger, reasons, failures)
    total, failed = sum(len(draw.rows) for draw in made), len(reasons)
    logger.info("%d tiles of %d slides are in %s", total, len(made) - failed, output)
    return len(made), failed


def _pictures(found: FoundSlides, preview: Path | None) -> list[Path | None]:
    """Where each slide's preview goes; slides of one name get a digest of their path behind it."""
    if preview is None:
        return [None] * len(found.slides)
    times = Counter(row.key for row in found.slides)
    pictures = []
    for row in found.slides:
        digest = hashlib.blake2b(row.path.encode(errors="surrogateescape"), digest_size=4).hexdigest()
        pictures.append(preview / (f"{row.key}.png" if times[row.key] == 1 else f"{row.key}.{digest}.png"))
        preview_mark(pictures[-1])  # raises where another file is in the way
    return pictures


def _failures(found: FoundSlides, made: list[SlideDraw]) -> Iterator[dict[str, Any]]:
    for row, draw in zip(found.slides, made, strict=True):
        if draw.failure:
            yield {"slide": row.path, "reason": draw.failure}
        for mpp, reason in draw.skipped.items():
            yield {"slide": row.path, "mpp": mpp, "reason": reason}


def _lines(found: FoundSlides, made: list[SlideDraw], sampling: Sampling, digest: Any) -> Iterator[str]:
    """The shuffled lines; `digest` takes them up."""
    slide = np.repeat(np.arange(len(made)), [len(draw.rows) for draw in made])
    rows = np.concatenate([draw.rows for draw in made])
    ends = [""] * len(slide)
    if sampling.mpps:
        ends = [f" {mpp:g} {mpp:g}" for mpp in np.concatenate([draw.mpp for draw in made]).tolist()]
    for i in np.random.Generator(np.random.Philox(key=sampling.seed)).permutation(len(rows)):
        line = f"{found.slides[slide[i]].path} {rows[i, 0]} {rows[i, 1]} {rows[i, 2]}{ends[i]}\n"
        digest.update(line.encode(errors="surrogateescape"))
        yield line


def _description(found: FoundSlides, made: list[SlideDraw], sampling: Sampling, digest: Any) -> Iterator[str]:
    """The `.meta.json`, once the lines have been written."""
    levels = Counter(level for draw in made for level in draw.rows[:, 2].tolist())
    mpps = Counter(mpp for draw in made for mpp in draw.mpp.tolist() if mpp)
    given = list(zip(found.slides, made, strict=True))
    description = {
        "columns": COLUMNS if sampling.mpps else COLUMNS[:4],
        **asdict(sampling),
        "num_slides": len(made),
        "num_slides_failed": sum(bool(draw.failure) for draw in made),
        "num_slides_duplicate": len(found.duplicates),
        "num_targets_skipped": sum(len(draw.skipped) for draw in made),
        "num_patches": levels.total(),
        "num_patches_by_level": {str(level): n for level, n in sorted(levels.items())},
        "num_patches_by_mpp": {f"{mpp:g}": n for mpp, n in sorted(mpps.items())},
        "level0_mpp": {row.path: draw.level0_mpp for row, draw in given if draw.level0_mpp},
        "notes": {row.path: draw.notes for row, draw in given if draw.notes},
        # what slides were told their mpp to be, so that training needs no table
        "slide_mpp": {row.path: draw.given_mpp for row, draw in given if draw.given_mpp},
        "sha256": digest.hexdigest(),
    }
    yield json.dumps(description, indent=2) + "\n"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python prepatching_scripts/create_sample_dataset_txt.py",
        __doc__.splitlines()[0],
        "/data/slides --output tiles.txt --mpp 0.5 --per-mpp 100 --preview previews",
    )
    add = parser.add_argument
    add("slides", type=Path, help="folder (with subfolders), text or .csv file of paths, or one slide")
    add("--output", type=Path, required=True, help="list to write; must not exist")
    add("--levels", type=int, nargs="+", help="pyramid levels; default: all of each slide")
    add("--mpp", type=float, nargs="+", default=[], help="um per px of the tiles, instead of levels")
    add("--magnification", type=float, nargs="+", default=[], help="the same as --mpp 10/magnification")
    add("--per-level", type=int, help="tiles per slide and level (500)")
    add("--per-mpp", type=int, help="tiles per slide and mpp (500)")
    add("--per-slide", type=int, help="at most so many tiles per slide, shared over its levels or mpp")
    add("--tile-size", type=int, default=224, help="side of a tile in px of its level or mpp (224)")
    add_options(parser, "--slide-root", "--mpp-file", "--mpp-tolerance")
    add_rule_options(parser)
    add("--min-tissue", type=float, default=TissueRule().min_fraction, help="fraction to exceed (0.6)")
    add("--reject-pen", action="store_true", help="refuse blue ink; red and purple look like stain")
    add("--preview", type=Path, metavar="FOLDER", help="draw a PNG per slide, tissue and tiles, and index.html")
    add("--seed", type=int, default=0)
    add_options(parser, "--workers")
    add("--max-failed-share", type=float, default=0.05, help="exit 1 if more slides fail (0.05)")
    if not (sys.argv[1:] if argv is None else argv):
        parser.error(
            "name the slides and the list, as in: /data/TCGA --output sample_dataset.txt "
            "(data_root, output_filename, patch_size and min_ratio of OpenMidnight's script are SLIDES, --output, "
            "--tile-size and --min-tissue)"
        )
    args = parser.parse_args(argv)
    for name in ("per_level", "per_mpp", "per_slide", "tile_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, but it must be at least 1")
    if args.seed < 0 or min(args.levels or [0]) < 0:
        parser.error(f"--seed {args.seed} and --levels {args.levels} must not be negative")
    args.mpp += [10 / power if power > 0 else power for power in args.magnification]
    if any(not PLAUSIBLE_MPP[0] <= mpp <= 100 for mpp in args.mpp):
        parser.error(f"--mpp and 10 / --magnification are {args.mpp}, but must lie within {PLAUSIBLE_MPP[0]:g} and 100")
    if (args.mpp and (args.levels or args.per_level)) or (args.per_mpp and not args.mpp):
        parser.error("--levels and --per-level go without --mpp or --magnification, --per-mpp with them")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit status of `dinov2.utils.cli`."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> int:
        rule = rule_of_options(args, args.min_tissue, args.reject_pen)
        levels = tuple(sorted(set(args.levels))) if args.levels else None
        mpps = tuple(sorted({float(f"{mpp:g}") for mpp in args.mpp}))  # rounded as the list writes them
        per_target = args.per_mpp or args.per_level or 500
        sampling = Sampling(
            rule, args.seed, levels, per_target, args.per_slide, args.tile_size, mpps, args.mpp_tolerance
        )
        total, failed = create_sample_list(
            args.slides, args.output, sampling, args.workers, args.mpp_file, args.preview, args.slide_root
        )
        if failed <= args.max_failed_share * total:
            return DONE
        logger.error(told_failures(failed, total, "slides", Path(f"{args.output}.failures.jsonl")))
        return FAILURES

    return run_command(body, logger, resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
