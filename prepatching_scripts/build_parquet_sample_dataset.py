"""Cut the patches of a sample list into Parquet shards of the published schema, by default one per slide.

A shard gets its name only when it is whole, so a build that was stopped goes on where it was when the same
command runs again. A patch that cannot be read leaves no row; it is listed in `failures.jsonl`.
"""

import argparse
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.parquet_shard import ROWS_PER_GROUP, Encoding, ShardJob, ShardOptions, build_shard
from dinov2.data.slide_jobs import json_lines, run_jobs, write_whole
from dinov2.data.slide_list import SampleList, locate_slide, read_sample_list
from dinov2.data.tissue import TissueRule

logger = logging.getLogger("build_parquet_sample_dataset")


def plan_shards(samples: SampleList, output: Path, rows_per_shard: int | None) -> dict[Path, SampleList]:
    """Share the list out over shards: its patches grouped by slide, in list order within a slide.

    Args:
        samples: the list.
        output: folder of the shards.
        rows_per_shard: rows of a shard, which may then span slides; None makes one shard per slide.
    """
    order = np.argsort(samples.slide, kind="stable")
    if rows_per_shard is None:
        cuts = np.flatnonzero(np.diff(samples.slide[order])) + 1
    else:
        cuts = np.arange(rows_per_shard, len(order), rows_per_shard)
    plan = {}
    for task, part in enumerate(np.split(order, cuts)):
        used, slide = np.unique(samples.slide[part], return_inverse=True)
        columns = (column[part] for column in (samples.x, samples.y, samples.level))
        plan[output / f"{task:08d}.parquet"] = SampleList(
            [samples.slides[i] for i in used], slide.astype(np.int32), *columns
        )
    return plan


def finished_shards(
    plan: dict[Path, SampleList], output: Path, build_id: str
) -> dict[Path, list[dict[str, Any]]]:
    """Shards of this build that are there already, with the failures that they keep.

    Raises:
        FileExistsError: the folder holds a shard of another build.
    """
    finished = {}
    for shard in sorted(output.glob("*.parquet")):
        try:
            metadata = pq.read_metadata(shard).metadata or {}
        except pa.ArrowException:
            metadata = {}
        if shard not in plan or metadata.get(b"build_id", b"").decode() != build_id:
            raise FileExistsError(
                f"'{shard}' was not made from this list with these options; "
                "give another --output or move it away."
            )
        finished[shard] = json.loads(metadata[b"failures"])
    return finished


def build_dataset(
    list_path: Path,
    output: Path,
    *,
    encoding: Encoding,
    tile_size: int = 224,
    mpp: float | None = None,
    slide_root: Path | None = None,
    rows_per_shard: int | None = None,
    workers: int = 1,
) -> tuple[int, int]:
    """Write the shards that are missing, then `failures.jsonl`.

    Returns:
        Number of patches in the list, and of those that could not be read.

    Raises:
        FileNotFoundError: there is no such list.
        FileExistsError: the folder holds shards of another build.
        ValueError: the list is malformed or was drawn for another tile size.
    """
    samples, drawn = read_sample_list(list_path), _list_metadata(list_path)
    if drawn.get("tile_size", tile_size) != tile_size:
        raise ValueError(
            f"The list '{list_path}' was drawn for tiles of {drawn['tile_size']} px, not {tile_size} px."
        )
    rule = drawn.get("rule", TissueRule())
    metadata = {
        "schema_version": "1",
        "tile_size": str(tile_size),
        **encoding.metadata(),
        "row_group_size": str(ROWS_PER_GROUP),
        "sample_list": samples.digest(),
        "seed": str(drawn.get("seed", "")),
        "tissue_rule": json.dumps(asdict(rule)),
        "reader": "openslide",
    }
    identity = json.dumps([metadata, mpp, rows_per_shard], sort_keys=True)
    build_id = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    plan = plan_shards(samples, output, rows_per_shard)
    failures = finished_shards(plan, output, build_id)
    output.mkdir(parents=True, exist_ok=True)

    options = ShardOptions(encoding, rule, tile_size, mpp, metadata | {"build_id": build_id})
    located = {name: locate_slide(name, slide_root) for name in samples.slides}
    jobs = [
        ShardJob(shard, part, [located[name] for name in part.slides], options)
        for shard, part in plan.items()
        if shard not in failures
    ]
    for place, failed in run_jobs(build_shard, jobs, workers, "shard"):
        failures[jobs[place].shard] = failed
    records = [record for shard in plan for record in failures[shard]]
    write_whole(output / "failures.jsonl", json_lines(records))
    logger.info("%d of %d patches are in %s", len(samples) - len(records), len(samples), output)
    return len(samples), len(records)


def _list_metadata(list_path: Path) -> dict[str, Any]:
    """What create_sample_dataset_txt.py wrote beside the list; nothing for a list from elsewhere."""
    path = list_path.with_name(f"{list_path.name}.meta.json")
    if not path.is_file():
        return {}
    try:
        drawn = json.loads(path.read_text())
        rule = drawn["rule"]
        drawn["rule"] = TissueRule(tuple(rule["lower"]), tuple(rule["upper"]), rule["min_fraction"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' does not describe a sample list ({error!r}); move it away.") from error
    return drawn


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample_list", type=Path, help="text file of 'path x y level' lines")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--slide-root", type=Path, help="folder that holds the listed slides, if they have moved"
    )
    parser.add_argument("--encoding", choices=("png", "jpeg", "raw"), default="png")
    parser.add_argument("--jpeg-quality", type=int, default=95, metavar="1..100")
    parser.add_argument("--jpeg-subsampling", choices=("4:2:0", "4:2:2", "4:4:4"), default="4:2:0")
    parser.add_argument("--tile-size", type=int, default=224, help="side of a patch in px of its level (224)")
    parser.add_argument("--mpp", type=float, help="um per level-0 px of slides that do not say")
    parser.add_argument("--rows-per-shard", type=int, help="rows of a shard; default: one shard per slide")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes; default: one per core"
    )
    parser.add_argument(
        "--max-failed-share", type=float, default=0.01, help="exit 1 if more patches fail (0.01)"
    )
    args = parser.parse_args(argv)
    for name in ("tile_size", "rows_per_shard", "workers", "jpeg_quality"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, but it must be at least 1")
    if args.jpeg_quality > 100:
        parser.error(f"--jpeg-quality is {args.jpeg_quality}, but it must be at most 100")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 1 with a one-sentence reason."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        total, failed = build_dataset(
            args.sample_list,
            args.output,
            encoding=Encoding(args.encoding, args.jpeg_quality, args.jpeg_subsampling),
            tile_size=args.tile_size,
            mpp=args.mpp,
            slide_root=args.slide_root,
            rows_per_shard=args.rows_per_shard,
            workers=args.workers,
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    if failed > args.max_failed_share * total:
        logger.error("%d of %d patches failed, see %s.", failed, total, args.output / "failures.jsonl")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
