"""Parquet shards of the published schema: row groups of 64, a name only when whole; plain or shuffled.

Shuffled shards, whose rows come from all slides, take bounded memory: an external sort by position in the order.
First the tiles are cut slide by slide in runs that fit in memory. A run's rows are sorted by their position and
spilled in sections, one per bucket: a stretch of one shard that fits in memory. Then each shard is written,
bucket by bucket, from the same section of all runs. Both steps restart where they were stopped.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2.data.prepare.cut import IMAGE_COLUMN, PATIENT_COLUMN, REASON, ROWS_AT_ONCE, Cutting, Tiles, cut_tiles
from dinov2.utils.files import commit, leftovers, replacing, unfinished, write_json
from dinov2.utils.jobs import run_jobs

ROWS_PER_GROUP = 64
_TEXT, _INTEGER, _FLOAT = pa.string(), pa.int32(), pa.float32()
SCHEMA = pa.schema([
    ("task_id", _TEXT), ("slide_path", _TEXT), ("x", _INTEGER), ("y", _INTEGER), ("level", _INTEGER),
    ("tile_size", _INTEGER), ("level_downsample", _FLOAT), ("image_dtype", _TEXT), (IMAGE_COLUMN, pa.binary()),
    ("slide_id", _TEXT), ("mpp", _FLOAT), ("mpp_source", _TEXT),  # mpp of the tile, null when unknown
    ("read_size", _INTEGER), ("tissue_frac", _FLOAT),  # px of the level that became tile_size px
    ("level_mpp", _FLOAT),  # um per px of the level, before the tile was resampled to mpp; null when unknown
])  # fmt: skip
TOLD_PATIENTS = "patient_column"  # key of the metadata of shards that have one more column
_PATIENT = pa.field(PATIENT_COLUMN, _TEXT)
_POSITION = "position"
_ROWS = pa.schema([(_POSITION, pa.int64()), *list(SCHEMA)[1:], _PATIENT, (REASON, pa.string())])
_RUNS_PER_WORKER = 4  # at least, so that workers end at about the same time
_PLAN = "plan.json"
Failures = list[dict[str, Any]]  # slide_path, x, y, level and reason of the rows without an image


def build_shard(metadata: dict[str, str], cutting: Cutting, job: tuple[Path, Tiles]) -> Failures:
    """Write one shard, unless no tile can be read, and return the failures, which the shard also keeps."""
    shard, tiles = job
    with new_shard(shard, metadata) as writer:
        for rows in cut_tiles(tiles, cutting, ROWS_AT_ONCE):
            for row in rows:
                writer.add(row)
    return writer.failures


class ShardWriter:
    """Collects rows into row groups, and the failures among them into the footer."""

    def __init__(self, writer: pq.ParquetWriter, task_id: str) -> None:
        self._writer, self._task_id = writer, task_id
        self._waiting: list[dict[str, Any]] = []
        self.failures: Failures = []
        self.num_rows = 0  # of those with one

    def add(self, row: dict[str, Any]) -> None:
        """Append a row without `task_id`, or note why there is none."""
        if row.get(REASON) is not None:
            self.failures.append({name: row[name] for name in ("slide_path", "x", "y", "level", REASON)})
            return
        self.num_rows += 1
        self._waiting.append(row | {"task_id": self._task_id})
        if len(self._waiting) == ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as a row group."""
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._writer.schema))
        self._waiting = []


@contextmanager
def new_shard(shard: Path, metadata: dict[str, str]) -> Iterator[ShardWriter]:
    """Write `shard`, which appears when the block ends well and holds at least one row."""
    schema = SCHEMA.append(_PATIENT) if TOLD_PATIENTS in metadata else SCHEMA
    plain = [name for name in schema.names if name != IMAGE_COLUMN]
    options = {"compression": "none", "use_dictionary": plain, "write_statistics": plain}
    with unfinished(shard) as temporary:
        with pq.ParquetWriter(temporary, schema.with_metadata(metadata), **options) as writer:
            rows = ShardWriter(writer, shard.stem)
            yield rows
            rows.flush()
            writer.add_key_value_metadata({"failures": json.dumps(rows.failures)})
        if rows.num_rows:
            commit(temporary, shard)


def shuffled_rows(num_rows: int, per_shard: int, seed: int) -> list[np.ndarray]:
    """Permute the rows of a list and divide them into shards; a pure function of its arguments."""
    rows = np.random.Generator(np.random.Philox(key=seed)).permutation(num_rows)
    return np.split(rows, range(per_shard, num_rows, per_shard))


def shuffled_shards(
    shards: dict[int, Path], tiles: Tiles, rows: Sequence[np.ndarray], cutting: Cutting, metadata: dict[str, str],
    work: Path, memory_rows: int, workers: int,
) -> Iterator[tuple[int, Failures]]:  # fmt: skip
    """Write shards of the shuffled order, by `workers` processes that hold `memory_rows` rows each.

    Args:
        shards: number and path of those that are missing.
        tiles: the whole list.
        rows: of the list in each shard, in its order; a row's position counts through all shards.
        metadata: key-values of all shards, with their `build_id`.
        work: folder for the runs, on the same file system or any other; stays until `clear_work`.

    Yields the number of a shard and the failures among its rows, as they finish; ValueError if a run is corrupt.
    """
    if not shards:
        return
    sizes = {number: len(rows[number]) for number in sorted(shards)}
    served, run_rows, bucket_rows = _open_work(work, metadata["build_id"], sizes, memory_rows, workers)
    ends = np.cumsum([0, *map(len, rows)])
    starts = [np.arange(ends[number], ends[number + 1], bucket_rows) for number in served]
    buckets = np.concatenate(starts)
    sections = dict(zip(served, pairwise(np.cumsum([0, *map(len, starts)]).tolist()), strict=True))
    positions = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in served])
    listed = np.concatenate([rows[number] for number in served])
    by_slide = np.lexsort((listed, tiles.samples.slide[listed]))
    parts = np.split(by_slide, range(run_rows, len(by_slide), run_rows))
    runs = [work / f"{i:06d}.run" for i in range(len(parts))]
    missing = [(run, part) for run, part in zip(runs, parts, strict=True) if not run.exists()]
    jobs = [(run, tiles.take(listed[part]), positions[part]) for run, part in missing]
    for _ in run_jobs(partial(write_run, buckets, cutting), jobs, workers, "run"):
        pass
    mixes = [(shards[number], range(*sections[number]), size) for number, size in sizes.items()]
    for number, failures in run_jobs(partial(mix_shard, metadata, runs), mixes, workers, "shard"):
        yield list(sizes)[number], failures


def write_run(buckets: np.ndarray, cutting: Cutting, job: tuple[Path, Tiles, np.ndarray]) -> None:
    """Cut the tiles of a run and spill them by their positions into buckets, which begin at the given ones.

    A run begins with an int64 per bucket and one for the end: where its section, an Arrow stream, lies.
    """
    run, tiles, positions = job
    [rows] = cut_tiles(tiles, cutting, len(tiles))
    by_position = np.argsort(positions)
    cuts = np.append(np.searchsorted(positions[by_position], buckets), len(by_position))
    with replacing(run) as temporary, temporary.open("wb") as file:
        offsets = [8 * len(cuts)]
        file.seek(offsets[0])
        for start, stop in pairwise(cuts.tolist()):
            section = [rows[i] | {_POSITION: int(positions[i])} for i in by_position[start:stop]]
            if section:
                with pa.ipc.new_stream(file, _ROWS) as stream:
                    stream.write_table(pa.Table.from_pylist(section, _ROWS))
            offsets.append(file.tell())
        file.seek(0)
        file.write(np.array(offsets, "<i8").tobytes())


def mix_shard(metadata: dict[str, str], runs: list[Path], job: tuple[Path, range, int]) -> Failures:
    """Write one shard from its buckets of all runs, with those that failed so many rows, as `build_shard` does."""
    shard, buckets, expected = job
    num_rows = 0
    with new_shard(shard, metadata) as writer:
        for bucket in buckets:
            sections = [section for run in runs if (section := _read_section(run, bucket)) is not None]
            positions = [section[_POSITION].to_numpy() for section in sections]
            which = np.repeat(np.arange(len(sections)), [len(part) for part in positions])
            within = np.concatenate([np.arange(len(part)) for part in positions])
            for i in np.argsort(np.concatenate(positions)).tolist():
                [row] = sections[which[i]].slice(within[i], 1).to_pylist()
                writer.add(row)
            num_rows += len(within)
        if num_rows != expected:
            raise ValueError(_corrupt(runs[0].parent, f"{num_rows} of {expected} rows of a shard are there"))
    return writer.failures


def _read_section(run: Path, bucket: int) -> pa.Table | None:
    with run.open("rb") as file:
        start, stop = np.frombuffer(os.pread(file.fileno(), 16, 8 * bucket), "<i8").tolist()
        if start == stop:
            return None
        file.seek(start)
        data = file.read(stop - start)
    try:
        return pa.ipc.open_stream(data).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_corrupt(run.parent, f"'{run.name}' cannot be read: {error}")) from error


def _corrupt(work: Path, reason: str) -> str:
    return f"The intermediate rows in '{work}' are corrupt ({reason}); delete that folder and start again."


def _open_work(
    work: Path, build_id: str, sizes: dict[int, int], memory_rows: int, workers: int
) -> tuple[list[int], int, int]:
    """Go on with the runs of an earlier start if they serve, else begin anew: (shards, rows of a run, of a bucket)."""
    try:
        plan = json.loads((work / _PLAN).read_text())
    except (FileNotFoundError, ValueError):
        plan = {}
    fits = max(plan.get("run_rows", 0), plan.get("bucket_rows", 0)) <= memory_rows
    if plan.get("build_id") != build_id or not sizes.keys() <= set(plan["shards"]) or not fits:
        clear_work(work)
        run_rows = min(memory_rows, max(ROWS_PER_GROUP, -(-sum(sizes.values()) // (_RUNS_PER_WORKER * workers))))
        plan = {"build_id": build_id, "shards": list(sizes), "run_rows": run_rows, "bucket_rows": memory_rows}
        work.mkdir()
        write_json(work / _PLAN, plan)
    return plan["shards"], plan["run_rows"], plan["bucket_rows"]


def clear_work(work: Path) -> None:
    """Remove a folder of runs, if there is one."""
    if not work.is_dir():
        return
    (work / _PLAN).unlink(missing_ok=True)  # first: runs without a plan are never used
    for path in [*(path for _, path in leftovers(work)), *work.glob("*.run")]:
        path.unlink(missing_ok=True)
    work.rmdir()
