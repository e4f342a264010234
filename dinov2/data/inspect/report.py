"""A JSON-ready report on a Parquet dataset: layout, images, slides, mixing, memory, and a verdict."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2.data.inspect.mixing import distinct_if_uniform, distinct_in_stream
from dinov2.data.parquet.footer import (
    Shard,
    Unusable,
    WrongSchema,
    describe_shard,
    in_one_line,
    open_shard,
    read_footers,
    slide_of,
)
from dinov2.data.parquet.source import repack_advice
from dinov2.data.source import DecodeError, decode_image, image_format
from dinov2.data.storage.base import LocalStorage, Storage
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.retry import RemoteError
from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.data.stream.order import SampleOrder

WINDOWS = (1, 10, 100)  # steps over which distinct slides are counted
_SAMPLED_GROUPS, _SAMPLED_ROWS = 16, 4
_SAMPLED_BYTES = 1 << 28  # of the row groups that images are sampled from, where they come over a network
_READ_GROUPS, _READ_REMOTE_GROUPS = 20_000, 500  # most row groups whose slide column is read
_NAMED = 3  # files named in a sentence
_WELL_MIXED = 0.9  # of the distinct slides of uniform sampling

Finding = tuple[str, str]  # a word for programs, and a sentence


@dataclass(frozen=True)
class Training:
    """The run to judge the dataset for."""

    batch: int = 384  # global batch B
    ranks: int = 8
    lanes: int = 0  # V; 0 takes what training takes, 8 B or less where memory or rows do not allow it
    block_rows: int = 64  # R
    memory_gib: float = 16.0  # most that the reader of one process may hold


def inspect_dataset(dataset: str, training: Training) -> dict[str, Any]:
    """Read all footers, some images, and slide names where footers do not tell them.

    Raises:
        FileNotFoundError, PermissionError, ValueError, ImportError, RemoteError: as `open_storage` does.
    """
    storage = open_storage(dataset)
    files = storage.list_files()
    found = read_footers(storage, files, partial(describe_shard, storage))
    shards = [item for item in found if isinstance(item, Shard)]
    report: dict[str, Any] = {
        "place": storage.place,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "unreadable": [item._asdict() for item in found if type(item) is Unusable],
        "wrong_schema": [item._asdict() for item in found if isinstance(item, WrongSchema)],
        "rows": sum(int(shard.rows.sum()) for shard in shards),
    }
    if report["rows"]:
        is_remote = not isinstance(storage, LocalStorage)
        rows, sizes = (
            np.concatenate(column)
            for column in zip(*((shard.rows, shard.images.plain_sizes) for shard in shards), strict=True)
        )
        report["row_groups"] = {"count": len(rows), "rows": _spread(rows), "image_bytes": _spread(sizes)}
        report["row_groups"]["repack"] = repack_advice(storage, rows, sizes)
        kinds = Counter(tuple(shard.columns.items()) for shard in shards)
        report["schemas"] = [{"files": n, "columns": dict(columns)} for columns, n in kinds.most_common()]
        report["stored"] = _stored(shards, report["rows"])
        report["images"] = _images(storage, shards)
        slides = _Slides(storage, shards, rows)
        report["slides"] = slides.summary()
        units = SimpleNamespace(unit_rows=rows, unit_bytes=sizes, is_remote=is_remote)
        report["stream"] = _stream(units, slides, training)
    reasons, advice = (
        [{"code": code, "text": text} for code, text in findings]
        for findings in (_reasons(report), _advice(report, training.batch))
    )
    return report | {"verdict": {"usable": not reasons, "reasons": reasons, "advice": advice}}


def _stored(shards: Sequence[Shard], rows: int) -> dict[str, Any]:
    """How the image column is stored, in numbers of row groups."""
    chunks = [shard.images for shard in shards]
    return {
        "columns": dict(Counter(shard.image for shard in shards)),
        "encodings": dict(Counter("+".join(sorted(names)) for chunk in chunks for names in chunk.encodings)),
        "compression": dict(Counter(name for chunk in chunks for name in chunk.codecs)),
        "with_dictionary": sum(sum(chunk.has_dictionary) for chunk in chunks),
        "with_page_index": sum(sum(chunk.has_page_index) for chunk in chunks),
        "bytes_per_image": round(sum(int(chunk.sizes.sum()) for chunk in chunks) / rows),
    }


def _images(storage: Storage, shards: Sequence[Shard]) -> dict[str, Any]:
    """Kinds and sizes of some images of row groups spread over the dataset."""
    groups = [(shard, group) for shard in shards for group in np.flatnonzero(shard.rows).tolist()]
    chosen = np.unique(np.linspace(0, len(groups) - 1, _SAMPLED_GROUPS).astype(int)).tolist()
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    corrupt, read = [], 0
    for shard, group in (groups[i] for i in chosen):
        read += int(shard.images.sizes[group])
        if read > _SAMPLED_BYTES and kinds and not isinstance(storage, LocalStorage):
            break
        try:
            with open_shard(storage, shard.file) as file:
                batch = next(file.iter_batches(_SAMPLED_ROWS, [group], [shard.image], use_threads=False))
            images = [value or b"" for value in batch[shard.image].to_pylist()]
        except RemoteError:
            raise
        except (pa.ArrowException, OSError) as error:
            corrupt.append({"file": shard.file.name, "row_group": group, "reason": in_one_line(error)})
            continue
        for row, data in enumerate(images):
            kind = "raw" if shard.raw_size else image_format(data)
            kinds[kind.lower() if kind else "neither PNG nor JPEG"] += 1
            try:
                height, width, _ = decode_image(data, shard.raw_size).shape
                sizes[f"{width}x{height}"] += 1
            except DecodeError as error:
                location = {"file": shard.file.name, "row_group": group, "row": row}
                corrupt.append(location | {"reason": str(error)})
    return {"sampled": kinds.total(), "kinds": dict(kinds), "sizes": dict(sizes), "corrupt": corrupt}


class _Slides:
    """Slide number of every row, from footers where they tell it, else from the slide column.

    Where that would take too many reads, a row group stands for a slide of its own.
    """

    def __init__(self, storage: Storage, shards: Sequence[Shard], group_rows: np.ndarray) -> None:
        numbers: dict[str | tuple[str, int], int] = {}
        left = _READ_GROUPS if isinstance(storage, LocalStorage) else _READ_REMOTE_GROUPS
        self._only: list[int] = []  # slide of each row group, -1 if there are several
        self._several: dict[int, np.ndarray] = {}  # slide of each row of these
        self._unknown = 0
        for shard in shards:
            for group, slide in enumerate(shard.slides):
                names = None if slide is None else [slide]
                if names is None and left and shard.rows[group]:
                    left -= 1
                    names = _slide_names(storage, shard, group)
                if names is None:
                    self._unknown += bool(shard.rows[group])
                    names = [(shard.file.name, group)]
                codes = np.array([numbers.setdefault(name, len(numbers)) for name in names])
                if (codes == codes[0]).all():
                    self._only.append(int(codes[0]))
                else:
                    self._several[len(self._only)] = codes
                    self._only.append(-1)
        self._rows, self._ends = group_rows, np.cumsum(group_rows)
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.rows) for shard in shards])

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Slide number, int64 (n,), of rows, (n,), counted through the dataset."""
        groups = np.searchsorted(self._ends, rows, side="right")
        codes = np.array(self._only)[groups]
        for i in np.flatnonzero(codes < 0).tolist():
            group = int(groups[i])
            codes[i] = self._several[group][rows[i] - self._ends[group]]
        return codes

    def in_shards(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each slide, int64 (S,), and slides in each shard that has rows, int64 (F,)."""
        only = np.array(self._only)
        alone = (only >= 0) & (self._rows > 0)
        slide, shard, rows = [only[alone]], [self._shard[alone]], [self._rows[alone]]
        for group, codes in self._several.items():
            found, counts = np.unique(codes, return_counts=True)
            slide.append(found)
            rows.append(counts)
            shard.append(np.full_like(found, self._shard[group]))
        slides, shards = np.concatenate(slide), np.concatenate(shard)
        pairs = np.unique(np.stack([shards, slides]), axis=1)
        per_shard = np.unique(pairs[0], return_counts=True)[1]
        of_slide = np.bincount(slides, np.concatenate(rows)).astype(np.int64)
        return of_slide[of_slide > 0], per_shard

    def summary(self) -> dict[str, Any]:
        """How many slides there are, and where they mix."""
        of_slide, per_shard = self.in_shards()
        return {
            "distinct": len(of_slide),
            "per_file": _spread(per_shard),
            "mixed_row_groups": len(self._several),
            "unknown_row_groups": self._unknown,
        }


def _slide_names(storage: Storage, shard: Shard, group: int) -> list[str] | None:
    """Slide of every row of a row group; None where it cannot be read."""
    try:
        with open_shard(storage, shard.file) as file:
            names = file.read_row_group(group, [shard.slide], use_threads=False)[shard.slide].to_pylist()
    except RemoteError:
        raise
    except (pa.ArrowException, OSError):
        return None
    return [slide_of(name or "", shard.image) for name in names]


def _stream(units: SimpleNamespace, slides: _Slides, training: Training) -> dict[str, Any]:
    """Lanes, memory and mixing of the order that training would use."""
    sharing = {"global_batch": training.batch, "world_size": training.ranks}
    first_rows = np.cumsum(units.unit_rows) - units.unit_rows

    def make_order(lanes: int) -> SampleOrder:
        return SampleOrder(units.unit_rows, seed=0, lanes=lanes, block_rows=training.block_rows)

    def slides_at(unit: np.ndarray, row: np.ndarray) -> np.ndarray:
        return slides.at(first_rows[unit] + row)

    limit, refused = training.memory_gib, ""
    lanes = training.lanes or 8 * training.batch
    try:
        lanes = fit_lanes(make_order, units, lanes=training.lanes, limit_gib=limit, **sharing)
    except ValueError as error:
        refused = str(error)
    order = make_order(lanes)
    prefetch = Prefetch.suited_to(units, limit * GIB)
    counted = distinct_in_stream(order, slides_at, training.batch, WINDOWS)
    of_slides, _ = slides.in_shards()
    return {
        "batch": training.batch,
        "ranks": training.ranks,
        "lanes": lanes,
        "block_rows": training.block_rows,
        "refused": refused,
        "memory_bytes_per_rank": memory_bound(units, order, prefetch=prefetch, **sharing),
        "distinct": [
            {
                "steps": steps,
                "stream": seen,
                "uniform": distinct_if_uniform(of_slides, steps * training.batch),
            }
            for steps, seen in zip(WINDOWS, counted, strict=True)
        ],
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _reasons(report: dict[str, Any]) -> Iterator[Finding]:
    """Why training cannot use the dataset."""
    wrong, unreadable = report["wrong_schema"], report["unreadable"]
    if wrong:
        yield ("wrong_schema", f"{len(wrong)} files have a wrong schema: {_named(wrong)}; take them away")
    if len(unreadable) == report["files"]:
        yield ("no_readable_file", f"no file has a readable footer: {_named(unreadable)}")
    elif not report["rows"]:
        yield ("no_rows", f"there are 0 rows in {report['files']} files")
    if not report["rows"]:
        return
    images, refused = report["images"], report["stream"]["refused"]
    if images["corrupt"] and not images["sizes"]:
        yield ("undecodable", f"none of the sampled images can be decoded: {_named(images['corrupt'])}")
    if refused:
        yield ("refused", refused)


def _advice(report: dict[str, Any], batch: int) -> Iterator[Finding]:
    """What else is good to know."""
    if not report["rows"]:
        return
    groups, stored, images, stream = (report[key] for key in ("row_groups", "stored", "images", "stream"))
    if report["unreadable"]:
        text = f"{len(report['unreadable'])} files cannot be read and would be left out"
        yield ("corrupt_files", f"{text}: {_named(report['unreadable'])}")
    if images["corrupt"] and images["sizes"]:
        text = f"{len(images['corrupt'])} sampled images or row groups are corrupt"
        text = f"{text}: {_named(images['corrupt'])}; training stops above data.max_corrupt_fraction"
        yield ("corrupt_images", text)
    if groups["repack"]:
        yield ("repack", groups["repack"])
    if set(stored["compression"]) - {"UNCOMPRESSED"} and "raw" not in images["kinds"]:
        yield (
            "compression",
            f"the image column is compressed ({', '.join(stored['compression'])}), which costs time and makes PNG and "
            "JPEG no smaller",
        )
    yield from _mixing(stream, report["rows"], groups["count"], batch)
    if "png" in images["kinds"]:
        yield (
            "png",
            "PNG tiles take 4 to 6 times the CPU of JPEG ones to decode and about 3 times the bytes; if the CPUs "
            "cannot keep up, build the shards anew with --encoding jpeg (which is lossy)",
        )
    if len(images["kinds"]) > 1 or len(images["sizes"]) > 1:
        found = ", ".join([*images["kinds"], *images["sizes"]])
        yield ("mixed_images", f"images differ in kind or size ({found}); training takes them as they come")


def _mixing(stream: dict[str, Any], rows: int, groups: int, batch: int) -> Iterator[Finding]:
    if rows < 8 * batch:
        few = f"{rows} rows are fewer than 8 global batches of {batch}"
        yield ("few_rows", f"{few}: fewer lanes, long repeats")
    elif 2 * stream["lanes"] < min(16 * batch, groups):
        yield ("lanes", f"{stream['lanes']} lanes are read side by side where {8 * batch} mix better")
    first = stream["distinct"][0]
    if first["stream"] < _WELL_MIXED * first["uniform"]:
        # Lanes that begin in the same row group are neighbours in a batch.
        remedy = "fewer lanes" if stream["lanes"] > groups else "smaller row groups or more lanes"
        yield (
            "mixing",
            f"a batch holds {first['stream']:.3g} distinct slides where uniform sampling has {first['uniform']:.3g}; "
            f"{remedy} would mix better",
        )


def _named(records: list[dict[str, Any]]) -> str:
    """The first few of some files with what is wrong with them."""
    shown = [f"{record.get('name') or record.get('file')} ({record['reason']})" for record in records[:_NAMED]]
    return "; ".join([*shown, f"and {len(records) - _NAMED} more"] if len(records) > _NAMED else shown)
