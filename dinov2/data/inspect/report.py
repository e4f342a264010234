"""What a Parquet dataset is like, as one JSON-ready report: layout, images, slides, mixing, memory, verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from dinov2.data.inspect.mixing import distinct_if_uniform, distinct_in_stream
from dinov2.data.inspect.verdict import verdict
from dinov2.data.parquet.footer import Shard, describe_shard, in_one_line, slide_of
from dinov2.data.parquet.shard_footers import Unusable, WrongSchema, open_shard, read_footers
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import DecodeError, decode_image
from dinov2.data.storage.base import LocalStorage, Storage
from dinov2.data.storage.locate import open_storage
from dinov2.data.storage.retry import RemoteError
from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.data.stream.order import SampleOrder

WINDOWS = (1, 10, 100)  # steps over which distinct slides are counted
_SAMPLED_GROUPS, _SAMPLED_ROWS = 16, 4
_SAMPLED_BYTES = 1 << 28  # of the row groups that images are sampled from, where they come over a network
_READ_GROUPS, _READ_REMOTE_GROUPS = 20_000, 500  # most row groups whose slide column is read


@dataclass(frozen=True)
class Training:
    """The run to judge the dataset for.

    Attributes:
        batch: Global batch B.
        ranks: Processes.
        lanes: V; 0 takes what training takes, 8 B or less where memory or rows do not allow it.
        block_rows: R.
        memory_gib: Most that the reader of one process may hold.
    """

    batch: int = 384
    ranks: int = 8
    lanes: int = 0
    block_rows: int = 64
    memory_gib: float = 16.0


def inspect_dataset(dataset: str, training: Training) -> dict[str, Any]:
    """Read all footers, some images, and slide names where footers do not tell them.

    Raises:
        FileNotFoundError, PermissionError, ValueError, ImportError, RemoteError: As `open_storage` does.
    """
    storage = open_storage(dataset)
    files = storage.list_files()
    found = read_footers(storage, files, partial(describe_shard, storage))
    shards = [item for item in found if isinstance(item, Shard)]
    report: dict[str, Any] = {
        "place": storage.place,
        "local": isinstance(storage, LocalStorage),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "unreadable": [item._asdict() for item in found if type(item) is Unusable],
        "wrong_schema": [item._asdict() for item in found if isinstance(item, WrongSchema)],
        "rows": sum(int(shard.rows.sum()) for shard in shards),
    }
    if report["rows"]:
        report |= {"row_groups": _row_groups(shards), "schemas": _schemas(shards), "stored": _stored(shards)}
        report["images"] = _images(storage, shards)
        slides = _Slides(storage, shards)
        report["slides"] = slides.summary()
        report["stream"] = _stream(_units(storage, shards), slides, training)
    return report | {"verdict": verdict(report, training.batch)}


def _row_groups(shards: Sequence[Shard]) -> dict[str, Any]:
    rows, sizes = _joined(shards)
    return {"count": len(rows), "rows": _spread(rows), "image_bytes": _spread(sizes)}


def _schemas(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    kinds = Counter(tuple(shard.columns.items()) for shard in shards)
    return [{"files": count, "columns": dict(columns)} for columns, count in kinds.most_common()]


def _stored(shards: Sequence[Shard]) -> dict[str, Any]:
    """How the image column is stored, in numbers of row groups."""
    chunks, rows = [shard.images for shard in shards], sum(int(shard.rows.sum()) for shard in shards)
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
    damage, read = [], 0
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
            damage.append({"file": shard.file.name, "row_group": group, "reason": in_one_line(error)})
            continue
        for row, data in enumerate(images):
            kinds[_kind(data, shard.raw_size)] += 1
            try:
                height, width, _ = decode_image(data, shard.raw_size).shape
                sizes[f"{width}x{height}"] += 1
            except DecodeError as error:
                place = {"file": shard.file.name, "row_group": group, "row": row}
                damage.append(place | {"reason": str(error)})
    return {"sampled": kinds.total(), "kinds": dict(kinds), "sizes": dict(sizes), "damaged": damage}


def _kind(data: bytes, raw_size: int) -> str:
    if raw_size:
        return "raw"
    marks = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
    return next((kind for kind, mark in marks.items() if data.startswith(mark)), "neither PNG nor JPEG")


class _Slides:
    """Slide number of every row, from footers where they tell it, else from the slide column.

    Where that would take too many reads, a row group stands for a slide of its own.
    """

    def __init__(self, storage: Storage, shards: Sequence[Shard]) -> None:
        numbers: dict[str | tuple[str, int], int] = {}
        left = _READ_GROUPS if isinstance(storage, LocalStorage) else _READ_REMOTE_GROUPS
        self._only: list[int] = []  # slide of each row group, -1 if there are several
        self._several: dict[int, np.ndarray] = {}  # slide of each row of these
        self.unknown = 0
        for shard in shards:
            for group, slide in enumerate(shard.slides):
                names = None if slide is None else [slide]
                if names is None and left and shard.rows[group]:
                    left -= 1
                    names = _slide_names(storage, shard, group)
                if names is None:
                    self.unknown += bool(shard.rows[group])
                    names = [(shard.file.name, group)]
                codes = np.array([numbers.setdefault(name, len(numbers)) for name in names])
                if (codes == codes[0]).all():
                    self._only.append(int(codes[0]))
                else:
                    self._several[len(self._only)] = codes
                    self._only.append(-1)
        self._rows, _ = _joined(shards)
        self._ends = np.cumsum(self._rows)
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
            "unknown_row_groups": self.unknown,
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


def _units(storage: Storage, shards: Sequence[Shard]) -> SimpleNamespace:
    """Rows and bytes of what training fetches at a time: row groups, or parts of giant ones in local files."""
    (rows, sizes), refused = _joined(shards), ""
    is_remote = not isinstance(storage, LocalStorage)
    if not is_remote:  # remote ones are not cut, and reading their footers twice may take long
        try:
            source = ParquetSource.from_storage(storage)
            rows, sizes = source.unit_rows, source.unit_bytes
        except (OSError, ValueError) as error:
            refused = str(error)
    return SimpleNamespace(unit_rows=rows, unit_bytes=sizes, is_remote=is_remote, refused=refused)


def _stream(units: SimpleNamespace, slides: _Slides, training: Training) -> dict[str, Any]:
    """Lanes, memory and mixing of the order that training would use."""
    sharing = {"global_batch": training.batch, "world_size": training.ranks}
    first_rows = np.cumsum(units.unit_rows) - units.unit_rows

    def make_order(lanes: int) -> SampleOrder:
        return SampleOrder(units.unit_rows, seed=0, lanes=lanes, block_rows=training.block_rows)

    def slides_at(unit: np.ndarray, row: np.ndarray) -> np.ndarray:
        return slides.at(first_rows[unit] + row)

    limit = training.memory_gib
    refused, lanes = units.refused, training.lanes or 8 * training.batch
    try:
        lanes = fit_lanes(make_order, units, lanes=training.lanes, limit_gib=limit, **sharing)
    except ValueError as error:
        refused = refused or str(error)
    order = make_order(lanes)
    prefetch = Prefetch.suited_to(units, limit * GIB)
    counted = distinct_in_stream(order, slides_at, training.batch, WINDOWS)
    of_slides, _ = slides.in_shards()
    return {
        "batch": training.batch,
        "ranks": training.ranks,
        "lanes": lanes,
        "block_rows": training.block_rows,
        "units": len(units.unit_rows),
        "unit_rows": int(units.unit_rows.max()),
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


def _joined(shards: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all row groups, and bytes of their images before compression, int64 (G,) each."""
    rows, sizes = zip(*((shard.rows, shard.images.plain_sizes) for shard in shards), strict=True)
    return np.concatenate(rows), np.concatenate(sizes)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
