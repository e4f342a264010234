"""Cut the tiles of a sample list into Parquet shards of the published schema, one per slide or shuffled.

A shard gets its name only when it is whole, so a build that was stopped goes on where it was when the same
command runs again. A tile that cannot be read leaves no row; it is listed in `failures.jsonl`, and so is every
further tile of a slide that was given up. `_build.json` says what the folder holds.

`--shuffle` gives every shard rows of all slides, in an order that depends on the list, the seed and
`--rows-per-shard` only. Tiles are first cut slide by slide into a hidden folder beside the shards, which takes
as much disk as the dataset and goes when the shards are done.

Several machines share the work by `--num-parts` and `--part`, each with a stretch of the shards of one folder on
a shared file system; with `--shuffle`, each cuts the tiles of its own shards from all slides and waits for no
other. What a part left undone is done by starting it again, or by the same command without the two options:

    #SBATCH --array=0-31
    srun python prepatching_scripts/build_parquet_sample_dataset.py list.txt --output shards --shuffle \\
        --num-parts 32 --part $SLURM_ARRAY_TASK_ID
"""

import argparse
import hashlib
import json
import logging
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.prepare import shard as parquet
from dinov2.data.prepare.cut import Cutting, Encoding, Tiles
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.find import locate
from dinov2.data.slides.identity import slides_and_patients
from dinov2.data.slides.resolution import MPP_TOLERANCE, read_mpp_table
from dinov2.data.slides.sample_list import read_list_description, read_sample_list
from dinov2.data.slides.tissue import TissueRule, add_rule_options, rule_of_options
from dinov2.utils.cli import DONE, FAILURES, add_options, command_parser, log_failures, run_command, told_failures
from dinov2.utils.files import (
    check_description,
    check_report,
    json_lines,
    leftovers,
    locked,
    naming_full_disk,
    write_json,
    write_text,
)
from dinov2.utils.jobs import run_jobs
from dinov2.utils.provenance import package_versions

logger = logging.getLogger("build_parquet_sample_dataset")

DESCRIPTION = "_build.json"
SHUFFLED_ROWS_PER_SHARD = 20_000
# Options of OpenMidnight's command that decide nothing here, without and with a value; then those that are refused.
_FLAGS = {
    "--keep-order": "rows are in the order of the list, slide by slide, unless --shuffle is given",
    "--shuffle-tasks": "the order in which shards are written does not matter; --shuffle mixes the slides",
    "--resume": "the same command always goes on where it was stopped",
}
_SETTINGS = {
    "--start-method": "workers are started as the platform needs it",
    "--max-open-slides": "each worker opens one slide at a time",
    "--log-level": "progress and failures are always told",
}
_ELSEWHERE = {
    "--mode": "nothing is overwritten or added to; give --output a new folder",
    "--task-chunk-size": "--rows-per-shard is the size of a shard",
    "--parquet-compression": "images are compressed already; python -m dinov2.data.repack --compression does the rest",
}
_FAILURE = {"slide_path", "x", "y", "level", "reason"}


class Build:
    """A list, and the shards that the options of a command line make of it.

    Attributes:
        rows: rows of the list that each shard holds, in its order.
        mine: the shards of this part.
        report: the file of failures, which every part writes for itself.

    Raises:
        FileNotFoundError: if there is no such list or mpp table.
        ValueError: if one of them is malformed, or the list was drawn for another tile size.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        list_path, tile_size, seed = args.sample_list, args.tile_size, args.seed if args.shuffle else None
        samples = read_sample_list(list_path, args.columns)
        drawn = read_list_description(list_path)
        if drawn.get("tile_size", tile_size) != tile_size:
            raise ValueError(
                f"The list '{list_path}' was drawn for tiles of {drawn['tile_size']} px, not {tile_size} px."
            )
        table = read_mpp_table(args.mpp_file) if args.mpp_file else None
        paths = [Path(locate(name, list_path, args.slide_root)) for name in samples.slides]
        given = [table.get(*slide) if table else None for slide in zip(samples.slides, paths, strict=True)]
        listed = drawn.get("slide_mpp") or {}
        given = [args.mpp if mpp is None else mpp for mpp in given]
        mpps = [listed.get(name) if mpp is None else mpp for name, mpp in zip(samples.slides, given, strict=True)]
        if told := sum(mpp is not None for mpp in mpps):
            logger.info("%d of %d slides have a given mpp, which counts in place of their own.", told, len(mpps))
        tolerance = drawn.get("mpp_tolerance", MPP_TOLERANCE) if args.mpp_tolerance is None else args.mpp_tolerance
        try:
            rule = TissueRule.described(drawn["rule"]) if "rule" in drawn and not args.tissue else TissueRule()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{list_path}.meta.json' does not describe a sample list ({error!r}); move it away."
            ) from error
        if args.tissue:
            rule = rule_of_options(args)
        encoding = Encoding(args.encoding, args.jpeg_quality, args.jpeg_subsampling)
        told = slides_and_patients([str(path) for path in paths])
        patients = [told[str(path)][1] for path in paths]
        self.args, self.tiles = args, Tiles(samples, paths, mpps, patients)
        self.cutting = Cutting(encoding, rule, tile_size, tolerance, args.max_slide_failures)
        per_shard = args.rows_per_shard
        if args.shuffle:
            per_shard = per_shard or SHUFFLED_ROWS_PER_SHARD
            self.rows = parquet.shuffled_rows(len(samples), per_shard, seed)
        else:
            order = np.argsort(samples.slide, kind="stable")
            slides_end = np.flatnonzero(np.diff(samples.slide[order])) + 1
            self.rows = np.split(order, range(per_shard, len(order), per_shard) if per_shard else slides_end)
        num_shards, parts = len(self.rows), args.num_parts
        self.mine = range(args.part * num_shards // parts, (args.part + 1) * num_shards // parts)
        self.report = args.output / f"failures{'' if parts == 1 else f'-part-{args.part}-of-{parts}'}.jsonl"
        self.metadata = {
            "schema_version": "1",
            "tile_size": str(tile_size),
            **encoding.metadata(),
            "row_group_size": str(parquet.ROWS_PER_GROUP),
            "sample_list": samples.digest(),
            "seed": str(drawn.get("seed", "")),
            "tissue_rule": json.dumps(asdict(rule)),
            **({parquet.TOLD_PATIENTS: _digest(patients)} if any(patients) else {}),
        }
        self.identity = {
            **self.metadata,
            "mpp": _digest({"given": mpps}) if any(mpps) else None,
            **({} if tolerance == MPP_TOLERANCE else {"mpp_tolerance": tolerance}),
            "rows_per_shard": per_shard,
            "shuffle_seed": seed,
            "max_slide_failures": args.max_slide_failures,
        }
        self.metadata["build_id"] = _digest(self.identity)
        with list_path.open("rb") as file:
            list_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.description = {
            "build": self.identity,
            "build_id": self.metadata["build_id"],
            "list": os.path.abspath(list_path),
            "list_sha256": list_sha256,
            "num_patches": len(samples),
            "num_slides": len(samples.slides),
            "num_shards": num_shards,
            "versions": package_versions(("path-fm", "numpy", "pyarrow", "opencv-python-headless", "pillow")),
        }


def build_dataset(build: Build) -> tuple[int, int]:
    """Write the shards of a part that are missing, and `failures.jsonl` if a tile cannot be read.

    Returns:
        Number of tiles in the part, and of those that could not be read.

    Raises:
        FileExistsError: if the folder holds another build, or another process writes the same shards.
        OSError: if a file cannot be written.
    """
    output, mine, is_whole = build.args.output, build.mine, build.args.num_parts == 1
    check_report(build.report, _FAILURE)
    if not check_description(output / DESCRIPTION, build.identity):
        _finished_shards(build, range(len(build.rows)))  # refuses what others made
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / DESCRIPTION, build.description)
    busy = f"Another builder is writing some of these shards into '{output}'; wait for it or stop it."
    with locked(output / DESCRIPTION, mine.start, len(mine), busy):
        names = {_name(number) for number in mine} | ({DESCRIPTION} if is_whole else set())
        for name, temporary in leftovers(output):
            if name in names:
                temporary.unlink(missing_ok=True)
        failures = _finished_shards(build, mine)
        work = output / f".shuffle-{mine.start:08d}-{mine.stop:08d}"
        missing = {number: output / _name(number) for number in mine if number not in failures}
        failures |= _missing_shards(build, missing, work)
        for done in output.glob(".shuffle-*") if is_whole else [work]:
            parquet.clear_work(done)
    records = [record for number in mine for record in failures[number]]
    if records:
        write_text(build.report, json_lines(records))
    else:  # no other file then lies among the shards, which some readers of folders would trip over
        build.report.unlink(missing_ok=True)
    # Of each slide one tile: what ails it ails the others.
    reasons = {record["slide_path"]: record["reason"] for record in reversed(records)}
    log_failures(logger, reasons, build.report)
    total = sum(len(build.rows[number]) for number in mine)
    logger.info("%d of %d tiles are in %s", total - len(records), total, output)
    return total, len(records)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _name(number: int) -> str:
    return f"{number:08d}.parquet"


def _missing_shards(build: Build, shards: dict[int, Path], work: Path) -> dict[int, parquet.Failures]:
    args = build.args
    if args.shuffle:
        memory_rows = max(1, int(args.memory_gib * 2**30 / (3 * args.tile_size**2)))
        how = build.cutting, build.metadata, work, memory_rows, args.workers
        return dict(parquet.shuffled_shards(shards, build.tiles, build.rows, *how))
    numbers = list(shards)
    jobs = [(shards[number], build.tiles.take(build.rows[number])) for number in numbers]
    function = partial(parquet.build_shard, build.metadata, build.cutting)
    return {numbers[index]: failed for index, failed in run_jobs(function, jobs, args.workers, "shard")}


def _finished_shards(build: Build, mine: range) -> dict[int, parquet.Failures]:
    """Which of some shards are there already, with the failures that they keep; FileExistsError if others are."""
    numbers = {_name(number): number for number in range(len(build.rows))}
    finished = {}
    for shard in sorted(build.args.output.glob("*.parquet")):
        number, metadata = numbers.get(shard.name), {}
        if number is not None and number not in mine:
            continue
        try:
            metadata = pq.read_metadata(shard).metadata or {}
        except pa.ArrowException as error:
            if number is not None:
                raise FileExistsError(f"'{shard}' is corrupt ({error}); move it away to have it made again.") from error
        if number is None or metadata.get(b"build_id", b"").decode() != build.metadata["build_id"]:
            raise FileExistsError(
                f"'{shard}' was not made from this list with these options; give another --output or move it away."
            )
        finished[number] = json.loads(metadata[b"failures"])
    return finished


def _check_openmidnights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Take the list by either name, and say what has the place of options that OpenMidnight's command has."""
    if (args.sample_list is None) == (args.spec_file is None):
        parser.error("give the sample list once, as SAMPLE_LIST or by --spec-file")
    args.sample_list = args.sample_list or args.spec_file
    given = {option: getattr(args, option[2:].replace("-", "_")) for option in (*_FLAGS, *_SETTINGS, *_ELSEWHERE)}
    for option, instead in _ELSEWHERE.items():
        if given[option] not in (None, "none"):  # as no compression is told
            parser.error(f"{option} {given[option]} is not available: {instead}")
    for option, instead in (_FLAGS | _SETTINGS).items():
        if given[option]:
            logger.warning("%s has no effect: %s.", option, instead)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python prepatching_scripts/build_parquet_sample_dataset.py",
        __doc__.splitlines()[0],
        "tiles.txt --output shards --encoding jpeg --shuffle",
    )
    add = parser.add_argument
    add(
        "sample_list",
        type=Path,
        nargs="?",
        help="text file of 'path x y level' lines, or with 'mpp_x mpp_y' after them",
    )
    add("--spec-file", type=Path, help="the same")
    add("--output", "--output-dir", type=Path, required=True, help="folder of the shards")
    add("--columns", type=int, choices=(4, 6), help="of a list without a .meta.json (4)")
    add("--encoding", choices=("png", "jpeg", "raw"), default="png")
    add("--jpeg-quality", type=int, default=95, metavar="1..100")
    add("--jpeg-subsampling", choices=("4:2:0", "4:2:2", "4:4:4"), default="4:2:0")
    add("--tile-size", type=int, default=224, help="side of a tile in px (224)")
    add_rule_options(parser, default=None)
    add("--mpp", type=float, help="um per level-0 px of slides not in --mpp-file, in place of what they say")
    add_options(parser, "--slide-root", "--mpp-file")
    add_options(
        parser, "--mpp-tolerance", default=None, help="of slides that are coarser than the list asks (as it was drawn)"
    )
    add("--rows-per-shard", type=int, help="default: one shard per slide, or 20,000 rows with --shuffle")
    add("--shuffle", action="store_true", help="mix the slides; takes the dataset's disk space twice")
    add("--seed", type=int, default=0, help="of --shuffle (0)")
    add("--memory-gib", type=float, default=1.0, help="images that a process of --shuffle may hold, raw (1)")
    add("--num-parts", type=int, default=1, help="machines that share the work (1)")
    add("--part", type=int, default=0, help="which of them this is, from 0")
    add_options(parser, "--workers")
    add("--max-slide-failures", type=int, default=100, help="undecodable tiles that give a slide up (100)")
    add("--max-failed-share", type=float, default=0.01, help="exit 1 if more tiles fail (0.01)")
    for option in (*_FLAGS, *_SETTINGS, *_ELSEWHERE):
        add(option, help=argparse.SUPPRESS, **({"action": "store_true"} if option in _FLAGS else {}))
    args = parser.parse_args(argv)
    _check_openmidnights(parser, args)
    for name in ("tile_size", "rows_per_shard", "jpeg_quality", "num_parts", "max_slide_failures"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, but it must be at least 1")
    if args.jpeg_quality > 100:
        parser.error(f"--jpeg-quality is {args.jpeg_quality}, but it must be at most 100")
    if not 0 <= args.part < args.num_parts:
        parser.error(f"--part is {args.part}, but it must lie within 0 to {args.num_parts - 1} (--num-parts less 1)")
    if args.seed < 0 or args.memory_gib <= 0:
        parser.error(f"--seed {args.seed} must not be negative, --memory-gib {args.memory_gib} must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns an exit status of `dinov2.utils.cli`."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def body() -> int:
        with naming_full_disk(args.output):
            build = Build(args)
            total, failed = build_dataset(build)
        if failed <= args.max_failed_share * total:
            return DONE
        logger.error(told_failures(failed, total, "tiles", build.report))
        return FAILURES

    return run_command(body, logger, errors=(SlideError,), resumable=True)


if __name__ == "__main__":
    raise SystemExit(main())
