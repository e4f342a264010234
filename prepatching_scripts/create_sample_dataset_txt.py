"""Draw tissue patches from slides and list them, one `path x y level` per line (x, y in level-0 pixels).

Which patches a slide gives depends on the seed and on its path below the input folder, not on other slides or
on the number of processes.
"""

import argparse
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dinov2.data.slide_jobs import json_lines, run_jobs, write_whole
from dinov2.data.tissue import TissueRule
from dinov2.data.tissue_sampling import Sampling, SlideJob, draw_from_slide

logger = logging.getLogger("create_sample_dataset_txt")

SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide"}


def find_slides(source: Path) -> list[tuple[str, str]]:
    """Find the slides of a folder (with its subfolders), of a text file with one path per line, or one slide.

    Returns:
        Absolute path and key of each slide, sorted by key in a folder, in the given order in a list. The key
        is the path below the folder, or the path's last part.

    Raises:
        FileNotFoundError: there is no such place, or no slide in it.
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    if source.is_dir():
        walk = os.walk(source, onerror=refuse)
        files = (Path(folder, name) for folder, _, names in walk for name in names)
        slides = [file for file in files if file.suffix.lower() in SLIDE_SUFFIXES]
        found = sorted((file.relative_to(source).as_posix(), os.path.abspath(file)) for file in slides)
    elif source.suffix.lower() in SLIDE_SUFFIXES and source.is_file():
        found = [(source.name, os.path.abspath(source))]
    elif source.is_file():
        lines = source.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        paths = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        found = [(Path(path).name, os.path.abspath(path)) for path in dict.fromkeys(paths)]
    else:
        raise FileNotFoundError(
            f"'{source}' does not exist; a folder, a list of paths or one slide is expected."
        )
    if not found:
        endings = ", ".join(sorted(SLIDE_SUFFIXES))
        raise FileNotFoundError(f"'{source}' holds no slide; at least one {endings} is expected.")
    return [(path, key) for key, path in found]


def create_sample_list(source: Path, output: Path, sampling: Sampling, workers: int) -> tuple[int, int]:
    """Write the list, `<output>.meta.json` and `<output>.failures.jsonl`.

    Returns:
        Number of slides, and of slides that failed.

    Raises:
        FileExistsError: one of the three files exists.
        FileNotFoundError: there is no slide.
    """
    meta, failures = (output.with_name(output.name + ending) for ending in (".meta.json", ".failures.jsonl"))
    for path in (output, meta, failures):
        if path.exists():
            raise FileExistsError(f"'{path}' exists already; give another --output or move it away.")
    slides = find_slides(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    jobs = [SlideJob(path, key, sampling) for path, key in slides]
    draws = dict(run_jobs(draw_from_slide, jobs, workers, "slide"))
    failed = [{"slide": slides[i][0], "reason": draws[i].failure} for i in sorted(draws) if draws[i].failure]
    write_whole(failures, json_lines(failed))

    slide = np.repeat(np.arange(len(slides)), [len(draws[i].rows) for i in range(len(slides))])
    rows = np.concatenate([draws[i].rows for i in range(len(slides))])
    order = np.random.Generator(np.random.Philox(key=sampling.seed)).permutation(len(rows))
    digest = hashlib.sha256()

    def lines() -> Iterator[str]:
        for i in order:
            line = f"{slides[slide[i]][0]} {rows[i, 0]} {rows[i, 1]} {rows[i, 2]}\n"
            digest.update(line.encode(errors="surrogateescape"))
            yield line

    write_whole(output, lines())
    description = {
        "columns": ["path", "x", "y", "level"],
        **asdict(sampling),
        "num_slides": len(slides),
        "num_slides_failed": len(failed),
        "num_patches": len(rows),
        "num_patches_by_level": {str(level): n for level, n in sorted(Counter(rows[:, 2].tolist()).items())},
        "sha256": digest.hexdigest(),
    }
    write_whole(meta, [json.dumps(description, indent=2) + "\n"])
    logger.info("%d patches of %d slides are in %s", len(rows), len(slides) - len(failed), output)
    return len(slides), len(failed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    rule = TissueRule()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "slides", type=Path, help="folder (with subfolders), text file of paths, or one slide"
    )
    parser.add_argument("--output", type=Path, required=True, help="list to write; must not exist")
    parser.add_argument("--levels", type=int, nargs="+", help="pyramid levels; default: all of each slide")
    parser.add_argument("--per-level", type=int, default=500, help="patches per slide and level (500)")
    parser.add_argument(
        "--per-slide", type=int, help="at most so many patches per slide, shared over its levels"
    )
    parser.add_argument("--tile-size", type=int, default=224, help="side of a patch in px of its level (224)")
    parser.add_argument("--hsv-lower", type=int, nargs=3, default=rule.lower, help="OpenCV HSV (90 8 103)")
    parser.add_argument("--hsv-upper", type=int, nargs=3, default=rule.upper, help="OpenCV HSV (180 255 255)")
    parser.add_argument("--min-tissue", type=float, default=rule.min_fraction, help="share to exceed (0.6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    parser.add_argument(
        "--max-failed-share", type=float, default=0.05, help="exit 1 above this share of failed slides (0.05)"
    )
    args = parser.parse_args(argv)
    for name in ("per_level", "per_slide", "tile_size", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, but it must be at least 1")
    if args.seed < 0 or min(args.levels or [0]) < 0:
        parser.error(f"--seed {args.seed} and --levels {args.levels} must not be negative")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 1 with a one-sentence reason."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rule = TissueRule(tuple(args.hsv_lower), tuple(args.hsv_upper), args.min_tissue)
        levels = tuple(sorted(set(args.levels))) if args.levels else None
        sampling = Sampling(rule, args.seed, levels, args.per_level, args.per_slide, args.tile_size)
        total, failed = create_sample_list(args.slides, args.output, sampling, args.workers)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    if failed > args.max_failed_share * total:
        logger.error("%d of %d slides failed, see %s.failures.jsonl.", failed, total, args.output)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
