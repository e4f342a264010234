"""Shuffled shards, whose rows come from all slides, in bounded memory: an external sort by position in the order.

First the patches are cut slide by slide in runs that fit in memory. A run's rows are sorted by their position and
spilled in sections, one per bucket: a stretch of one shard that fits in memory. Then each shard is written,
bucket by bucket, from the same section of all runs. Both steps restart where they were stopped.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2.data.prepare.cut import REASON, Cutting, Patches, cut_patches
from dinov2.data.prepare.shard import ROWS_PER_GROUP, SCHEMA, new_shard
from dinov2.utils.files import commit, leftovers, unfinished, write_json
from dinov2.utils.jobs import run_jobs

_POSITION = "position"
_ROWS = pa.schema([(_POSITION, pa.int64()), *list(SCHEMA)[1:], (REASON, pa.string())])
_RUNS_PER_WORKER = 4  # at least, so that workers end at about the same time
_PLAN = "plan.json"


@dataclass(frozen=True)
class Order:
    """The shuffled order: row `rows[p]` of the list comes at position p; shard k ends before (k + 1) * per_shard."""

    rows: np.ndarray
    per_shard: int

    @classmethod
    def draw(cls, num_rows: int, per_shard: int, seed: int) -> "Order":
        """Permute `num_rows` rows; a pure function of its arguments."""
        return cls(np.random.Generator(np.random.Philox(key=seed)).permutation(num_rows), per_shard)

    def shard(self, number: int) -> range:
        """Positions of a shard."""
        return range(number * self.per_shard, min((number + 1) * self.per_shard, len(self.rows)))


@dataclass(frozen=True)
class RunJob:
    """Patches to cut and spill, their positions, and the positions where buckets begin."""

    run: Path
    patches: Patches
    positions: np.ndarray
    buckets: np.ndarray
    cutting: Cutting


@dataclass(frozen=True)
class MixJob:
    """One shard to write from the sections `buckets` of all runs; `num_rows` with those that failed."""

    shard: Path
    metadata: dict[str, str]
    runs: list[Path]
    buckets: range
    num_rows: int


def shuffled_shards(
    shards: dict[int, Path],
    patches: Patches,
    order: Order,
    cutting: Cutting,
    metadata: dict[str, str],
    work: Path,
    memory_rows: int,
    workers: int,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Write shards of the shuffled order.

    Args:
        shards: number and path of those that are missing.
        patches: the whole list.
        order: where its rows go.
        cutting: how patches are cut.
        metadata: key-values of all shards, with their `build_id`.
        work: folder for the runs, on the same file system or any other; stays until `clear_work`.
        memory_rows: rows that a process may hold.
        workers: processes.

    Yields:
        Number of a shard and the failures among its rows, as they finish.

    Raises:
        OSError: if a run or a shard cannot be written.
        ValueError: if a run is corrupt.
    """
    if not shards:
        return
    served, run_rows, bucket_rows = _open_work(work, metadata["build_id"], sorted(shards), order, memory_rows, workers)
    starts = [range(stretch.start, stretch.stop, bucket_rows) for stretch in map(order.shard, served)]
    buckets = np.concatenate([np.array(part, np.int64) for part in starts])
    sections = dict(zip(served, pairwise(np.cumsum([0, *map(len, starts)]).tolist()), strict=True))

    positions = np.concatenate([np.array(order.shard(number), np.int64) for number in served])
    rows = order.rows[positions]
    by_slide = np.lexsort((rows, patches.samples.slide[rows]))
    parts = np.split(by_slide, range(run_rows, len(by_slide), run_rows))
    runs = [work / f"{i:06d}.run" for i in range(len(parts))]
    jobs = [
        RunJob(run, patches.take(rows[part]), positions[part], buckets, cutting)
        for run, part in zip(runs, parts, strict=True)
        if not run.exists()
    ]
    for _ in run_jobs(write_run, jobs, workers, "run"):
        pass
    numbers = sorted(shards)
    mixes = [MixJob(shards[n], metadata, runs, range(*sections[n]), len(order.shard(n))) for n in numbers]
    for number, failures in run_jobs(mix_shard, mixes, workers, "shard"):
        yield numbers[number], failures


def write_run(job: RunJob) -> None:
    """Cut the patches of a run and spill them by position.

    A run begins with one int64 per bucket and one for the end: where its section lies. A section is a stream of
    Arrow record batches.

    Raises:
        OSError: if the run cannot be written.
    """
    [rows] = cut_patches(job.patches, job.cutting, len(job.patches))
    by_position = np.argsort(job.positions)
    cuts = np.append(np.searchsorted(job.positions[by_position], job.buckets), len(by_position))
    with unfinished(job.run) as partial:
        with partial.open("wb") as file:
            offsets = [8 * len(cuts)]
            file.seek(offsets[0])
            for start, stop in pairwise(cuts.tolist()):
                section = [rows[i] | {_POSITION: int(job.positions[i])} for i in by_position[start:stop]]
                if section:
                    with pa.ipc.new_stream(file, _ROWS) as stream:
                        stream.write_table(pa.Table.from_pylist(section, _ROWS))
                offsets.append(file.tell())
            file.seek(0)
            file.write(np.array(offsets, "<i8").tobytes())
        commit(partial, job.run)


def mix_shard(job: MixJob) -> list[dict[str, Any]]:
    """Write one shard, unless no patch could be read, and return the failures, which the shard also keeps.

    Raises:
        OSError: if the shard cannot be written.
        ValueError: if a run is corrupt.
    """
    num_rows = 0
    with new_shard(job.shard, job.metadata) as writer:
        for bucket in job.buckets:
            sections = [section for run in job.runs if (section := _read_section(run, bucket)) is not None]
            positions = [section[_POSITION].to_numpy() for section in sections]
            which = np.repeat(np.arange(len(sections)), [len(part) for part in positions])
            within = np.concatenate([np.arange(len(part)) for part in positions])
            for i in np.argsort(np.concatenate(positions)).tolist():
                [row] = sections[which[i]].slice(within[i], 1).to_pylist()
                writer.add(row)
            num_rows += len(within)
        if num_rows != job.num_rows:
            raise ValueError(_corrupt(job.runs[0].parent, f"{num_rows} of {job.num_rows} rows of a shard are there"))
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
    work: Path, build_id: str, missing: list[int], order: Order, memory_rows: int, workers: int
) -> tuple[list[int], int, int]:
    """Go on with the runs of an earlier start if they serve, else begin anew: (shards, rows of a run, of a bucket)."""
    try:
        plan = json.loads((work / _PLAN).read_text())
    except (FileNotFoundError, ValueError):
        plan = {}
    fits = max(plan.get("run_rows", 0), plan.get("bucket_rows", 0)) <= memory_rows
    if plan.get("build_id") == build_id and set(missing) <= set(plan["shards"]) and fits:
        return plan["shards"], plan["run_rows"], plan["bucket_rows"]
    clear_work(work)
    num_rows = sum(len(order.shard(number)) for number in missing)
    run_rows = min(memory_rows, max(ROWS_PER_GROUP, -(-num_rows // (_RUNS_PER_WORKER * workers))))
    plan = {"build_id": build_id, "shards": missing, "run_rows": run_rows, "bucket_rows": memory_rows}
    work.mkdir()
    write_json(work / _PLAN, plan)
    return missing, run_rows, memory_rows


def clear_work(work: Path) -> None:
    """Remove a folder of runs, if there is one."""
    if not work.is_dir():
        return
    (work / _PLAN).unlink(missing_ok=True)  # first: runs without a plan are never used
    for path in [*(partial for _, partial in leftovers(work)), *work.glob("*.run")]:
        path.unlink(missing_ok=True)
    work.rmdir()
