"""Look at a dataset before training on it: files, row groups, images, slides, how well the sample order would mix them,
and a verdict. Of Parquet shards it reads all footers, some images, and slide names where footers do not tell them; of
other kinds what a run reads to open them, and some images.

    python -m dinov2.data.inspect SRC
"""

import argparse
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dinov2.data.kinds import open_source, recognise
from dinov2.data.parquet import footer
from dinov2.data.parquet.footer import Shard, open_shard
from dinov2.data.parquet.source import repack_advice
from dinov2.data.patients import patient_of
from dinov2.data.source import DecodeError, EncodedSample, Source, decode_image, image_format, origins_of
from dinov2.data.storage.base import LocalStorage, Storage
from dinov2.data.storage.locate import NAMES, open_storage
from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.data.stream.order import SampleOrder
from dinov2.extensions import SOURCES
from dinov2.utils.cli import DONE, FAILURES, at_least, command_parser, run_command
from dinov2.utils.files import write_text

logger = logging.getLogger("inspect")

WINDOWS = (1, 10, 100)  # steps over which distinct slides are counted; each divides the last
_SAMPLED_GROUPS, _SAMPLED_ROWS = 16, 4
_SAMPLED_BYTES = 1 << 28  # of the row groups that images are sampled from, where they come over a network
_READ_GROUPS, _READ_REMOTE_GROUPS = 20_000, 500  # most row groups whose slide column is read
_NAMED = 3  # files named in a sentence
_WELL_MIXED = 0.9  # of the distinct slides of uniform sampling
Finding = tuple[str, str]  # a word for programs, and a sentence


def _option(default: float, least: float, text: str) -> Any:
    return field(default=default, metadata={"type": at_least(least, type(default)), "help": f"{text} (%(default)s)"})


@dataclass(frozen=True)
class Training:
    """The run to judge the dataset for; each field is an option of the command."""

    batch: int = _option(384, 1, "global batch size")
    ranks: int = _option(8, 1, "processes that share it")
    lanes: int = _option(0, 0, "streams read side by side and interleaved; 0: 8 x batch or what rows and memory allow")
    block_rows: int = _option(64, 1, "rows shuffled together")
    memory_gib: float = _option(16.0, 0, "most that the reader of one process may hold")


def inspect_source(dataset: str, kind: str, training: Training, **keys: str) -> dict[str, Any]:
    """Open a dataset of any kind, decode some images and name all slides; as `open_source`, whose ``keys`` it takes."""
    kind, source = open_source(dataset, kind, **keys)
    advice = getattr(source, "repack_advice", str)()
    spreads = {"rows": _spread_of(source.group_rows), "image_bytes": _spread_of(source.group_bytes)}
    report: dict[str, Any] = {
        "place": getattr(source, "location", dataset),
        "kind": kind,
        "rows": source.num_rows,
        "row_groups": {"count": len(source.group_rows)} | spreads | {"repack": advice},
        "images": _sample_source(source),
    }
    numbers, patients = {}, set()
    slides, mixed, first = np.empty(source.num_rows, np.int32), 0, 0
    for group in range(len(source.group_rows)):
        origins = origins_of(source, group)
        own = [numbers.setdefault(origin.slide, len(numbers)) for origin in origins]
        slides[first : first + len(own)] = own
        patients.update(patient_of(*origin[:2]) for origin in set(origins))
        mixed, first = mixed + (len(set(own)) > 1), first + len(own)
    report["slides"] = {"distinct": len(numbers), "patients": len(patients), "mixed_row_groups": mixed}
    report["stream"] = _judge_stream(source, slides, training)
    return report | _verdict(report, training)


def inspect_dataset(dataset: str, training: Training, image_column: str = "") -> dict[str, Any]:
    """Read all footers, some images, and slide names where footers do not tell them; raises as `open_storage`."""
    storage = open_storage(dataset, train_only=True)
    files = storage.list_files()
    found = footer.read_footers(storage, files, partial(footer.describe_shard, storage, named=image_column))
    shards = [item for item in found if isinstance(item, Shard)]
    beside = footer.Foreign if shards else ()  # the shards; alone they are what is wrong
    report: dict[str, Any] = {
        "place": storage.location,
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "unreadable": [item._asdict() for item in found if type(item) is footer.Unusable],
        "no_images": [item._asdict() for item in found if isinstance(item, beside)],
        "wrong_schema": [
            item._asdict() for item in found if isinstance(item, footer.WrongSchema) and not isinstance(item, beside)
        ],
        "rows": sum(int(shard.rows.sum()) for shard in shards),
    }
    if report["rows"]:
        rows = np.concatenate([shard.rows for shard in shards])
        sizes = np.concatenate([shard.plain_sizes for shard in shards])
        spreads = {"rows": _spread_of(rows), "image_bytes": _spread_of(sizes)}
        report["row_groups"] = (
            {"count": len(rows)} | spreads | {"repack": repack_advice(storage, rows, sizes, image_column)}
        )
        kinds = Counter(tuple(shard.columns.items()) for shard in shards)
        report["schemas"] = [{"files": n, "columns": dict(columns)} for columns, n in kinds.most_common()]
        report["stored"] = {
            "columns": dict(Counter(shard.image for shard in shards)),
            "encodings": dict(sum((shard.encodings for shard in shards), Counter())),
            "compression": dict(sum((shard.codecs for shard in shards), Counter())),
            "with_dictionary": sum(shard.with_dictionary for shard in shards),
            "with_page_index": sum(shard.with_page_index for shard in shards),
            "bytes_per_image": round(sum(int(shard.sizes.sum()) for shard in shards) / report["rows"]),
        }
        report["images"] = _sample_images(storage, shards)
        slides, report["slides"] = _find_slides(storage, shards)
        groups = SimpleNamespace(group_rows=rows, group_bytes=sizes, is_remote=not isinstance(storage, LocalStorage))
        report["stream"] = _judge_stream(groups, slides, training)
    return report | _verdict(report, training)


def _verdict(report: dict[str, Any], training: Training) -> dict[str, Any]:
    findings = _reasons(report), _advice(report, training.batch) if report["rows"] else ()
    reasons, advice = ([{"code": code, "text": text} for code, text in some] for some in findings)
    return {"verdict": {"usable": not reasons, "reasons": reasons, "advice": advice}}


def distinct_if_uniform(slide_rows: np.ndarray, samples: int) -> float:
    """Expected distinct slides among n samples of rows, int (S,) of each slide, drawn uniformly without replacement.

    A slide of s of the N rows is missed with probability C(N-s, n) / C(N, n); an n above N counts as N.
    """
    total = int(slide_rows.sum())
    draws = min(samples, total)

    def ways(rows: int) -> float:
        """Logarithm of the ways to draw, order counting."""
        return math.lgamma(rows + 1) - math.lgamma(rows - draws + 1) if rows >= draws else -math.inf

    sizes, counts = np.unique(slide_rows[slide_rows > 0], return_counts=True)
    missed = [math.exp(ways(total - size) - ways(total)) for size in sizes.tolist()]
    return float(counts @ (1 - np.array(missed)))


def _sample_images(storage: Storage, shards: Sequence[Shard]) -> dict[str, Any]:
    """Kinds and sizes of some images of row groups spread over the dataset."""
    groups = [(shard, group) for shard in shards for group in np.flatnonzero(shard.rows).tolist()]
    chosen = np.unique(np.linspace(0, len(groups) - 1, _SAMPLED_GROUPS).astype(int)).tolist()
    kinds, sizes, corrupt, read = Counter(), Counter(), [], 0
    for shard, group in (groups[i] for i in chosen):
        read += int(shard.sizes[group])
        if read > _SAMPLED_BYTES and kinds and not isinstance(storage, LocalStorage):
            break
        location = {"file": shard.file.name, "row_group": group}
        try:
            with footer.as_corruption(), open_shard(storage, shard.file) as file:
                batch = next(file.iter_batches(_SAMPLED_ROWS, [group], [shard.image], use_threads=False))
                images = [value or b"" for value in footer.image_values(batch, shard.image).to_pylist()]
        except footer.CorruptShard as error:
            corrupt.append(location | {"reason": str(error)})
            continue
        for row, data in enumerate(images):
            kind = "raw" if shard.raw_size else image_format(data)
            kinds[kind.lower() or "unknown"] += 1
            try:
                height, width, _ = decode_image(data, shard.raw_size).shape
                sizes[f"{width}x{height}"] += 1
            except DecodeError as error:
                corrupt.append(location | {"row": row, "reason": str(error)})
    return {"sampled": kinds.total(), "kinds": dict(kinds), "sizes": dict(sizes), "corrupt": corrupt}


def _sample_source(source: Source) -> dict[str, Any]:
    """As `_sample_images`, of any source."""
    groups = np.flatnonzero(source.group_rows)
    chosen = groups[np.unique(np.linspace(0, len(groups) - 1, _SAMPLED_GROUPS).astype(int))].tolist()
    kinds, sizes, corrupt = Counter(), Counter(), []
    for group in chosen:
        rows = range(min(_SAMPLED_ROWS, int(source.group_rows[group])))
        for row, (slide, data) in zip(rows, source.read(group, rows), strict=True):
            try:
                height, width, _ = source.decode(EncodedSample(0, group, row, slide, data)).shape
                sizes[f"{width}x{height}"] += 1
            except DecodeError as error:
                corrupt.append({"file": source.describe(group, row), "reason": str(error)})
            kinds[image_format(data).lower() or "raw"] += 1
    return {"sampled": kinds.total(), "kinds": dict(kinds), "sizes": dict(sizes), "corrupt": corrupt}


def _find_slides(storage: Storage, shards: Sequence[Shard]) -> tuple[np.ndarray, dict[str, Any]]:
    """Number the slide of every row, int32 (rows,), and tell how many there are and where they mix.

    They are told by footers or the slide column; where that takes too many reads, a row group counts as a slide.
    """
    numbers: dict[str | tuple[str, int], int] = {}
    slides = np.empty(sum(int(shard.rows.sum()) for shard in shards), np.int32)
    left = _READ_GROUPS if isinstance(storage, LocalStorage) else _READ_REMOTE_GROUPS
    first = mixed = unknown = 0
    per_shard = []
    for shard in shards:
        of_shard: set[int] = set()
        for group in np.flatnonzero(shard.rows).tolist():
            end = first + int(shard.rows[group])
            names: list[Any] = [shard.slides[group]]
            if names == [None]:
                names = _read_slides(storage, shard, group) if left else []
                left -= left > 0
            if len(names) not in (1, end - first):
                unknown += 1
                names = [(shard.file.name, group)]
            slides[first:end] = own = [numbers.setdefault(name, len(numbers)) for name in names]
            mixed += len(set(own)) > 1
            of_shard.update(own)
            first = end
        if of_shard:
            per_shard.append(len(of_shard))
    found = {"distinct": len(numbers), "per_file": _spread_of(np.array(per_shard))}
    return slides, found | {"mixed_row_groups": mixed, "unknown_row_groups": unknown}


def _read_slides(storage: Storage, shard: Shard, group: int) -> list[str]:
    """Slide of every row of a row group; empty where it cannot be read."""
    try:
        with footer.as_corruption(), open_shard(storage, shard.file) as file:
            names = file.read_row_group(group, [shard.slide], use_threads=False)[shard.slide].to_pylist()
    except footer.CorruptShard:
        return []
    return [footer.slide_of(name or "", shard.image) for name in names]


def _judge_stream(groups: Any, slides: np.ndarray, training: Training) -> dict[str, Any]:
    """Lanes, memory and mixing of the order that training would use."""
    sharing = {"global_batch": training.batch, "world_size": training.ranks}

    def make_order(lanes: int) -> SampleOrder:
        return SampleOrder(groups.group_rows, seed=0, lanes=lanes, block_rows=training.block_rows)

    limit, refused = training.memory_gib, ""
    lanes = training.lanes or 8 * training.batch
    try:
        lanes = fit_lanes(make_order, groups, lanes=training.lanes, limit_gib=limit, **sharing)
    except ValueError as error:
        refused = str(error)
    order = make_order(lanes)
    prefetch = Prefetch.suited_to(groups, limit * GIB)
    first_rows = np.cumsum(groups.group_rows) - groups.group_rows
    seen = []  # slides of each step of the first epoch
    for step in range(WINDOWS[-1]):
        samples = order.locate(np.arange(step * training.batch, (step + 1) * training.batch))
        seen.append(slides[first_rows[samples.group] + samples.row])
    distinct, slide_rows = [], np.bincount(slides)
    for steps in WINDOWS:
        counts = [len(np.unique(window)) for window in np.reshape(seen, (WINDOWS[-1] // steps, -1))]
        uniform = distinct_if_uniform(slide_rows, steps * training.batch)
        distinct.append({"steps": steps, "stream": float(np.mean(counts)), "uniform": uniform})
    held = memory_bound(groups, order, prefetch=prefetch, **sharing)
    settings = {"batch": training.batch, "ranks": training.ranks, "lanes": lanes, "block_rows": training.block_rows}
    return settings | {"refused": refused, "memory_bytes_per_rank": held, "distinct": distinct}


def _spread_of(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _reasons(report: dict[str, Any]) -> Iterator[Finding]:
    """Reasons why training cannot use the dataset."""
    wrong, unreadable = report.get("wrong_schema"), report.get("unreadable", ())
    if wrong:
        yield "wrong_schema", f"{len(wrong)} files have a wrong schema: {_named(wrong)}; take them away"
    if unreadable and len(unreadable) == report["files"]:
        yield "no_readable_file", f"no file has a readable footer: {_named(unreadable)}"
    elif not report["rows"]:
        yield "no_rows", f"there are 0 rows in {report['files']} files"
    if not report["rows"]:
        return
    images, refused = report["images"], report["stream"]["refused"]
    if images["corrupt"] and not images["sizes"]:
        yield "undecodable", f"none of the sampled images can be decoded: {_named(images['corrupt'])}"
    if refused:
        yield "refused", refused


def _advice(report: dict[str, Any], batch: int) -> Iterator[Finding]:
    """Warnings, and what else is good to know."""
    groups, images, stream = (report[key] for key in ("row_groups", "images", "stream"))
    unreadable, corrupt = report.get("unreadable"), images["corrupt"]
    if unreadable:
        yield "corrupt_files", f"{len(unreadable)} files cannot be read and would be left out: {_named(unreadable)}"
    if corrupt and images["sizes"]:
        text = f"{len(corrupt)} sampled images or row groups are corrupt: {_named(corrupt)}"
        yield "corrupt_images", f"{text}; training stops above data.max_corrupt_fraction"
    if groups["repack"]:
        yield "repack", groups["repack"]
    codecs = ", ".join(report.get("stored", {}).get("compression", ()))
    if codecs not in ("", "UNCOMPRESSED") and "raw" not in images["kinds"]:
        text = f"the image column is compressed ({codecs}), which costs time and makes PNG and JPEG no smaller"
        yield "compression", text
    yield from _mixing_advice(stream, report["rows"], groups["count"], batch)
    if "png" in images["kinds"]:
        text = "PNG tiles take 4 to 6 times the CPU of JPEG ones to decode and about 3 times the bytes; if the CPUs "
        yield "png", f"{text}cannot keep up, build the shards anew with --encoding jpeg (which is lossy)"
    if len(images["kinds"]) > 1 or len(images["sizes"]) > 1:
        found = ", ".join([*images["kinds"], *images["sizes"]])
        yield "mixed_images", f"images differ in kind or size ({found}); training takes them as they come"


def _mixing_advice(stream: dict[str, Any], rows: int, groups: int, batch: int) -> Iterator[Finding]:
    lanes, first = stream["lanes"], stream["distinct"][0]
    if rows < 8 * batch:
        yield "few_rows", f"{rows} rows are fewer than 8 global batches of {batch}: fewer lanes, long repeats"
    elif 2 * lanes < min(16 * batch, groups):
        yield "lanes", f"{lanes} lanes are read side by side where {8 * batch} mix better"
    if first["stream"] < _WELL_MIXED * first["uniform"]:
        # Lanes that begin in the same row group are neighbours in a batch.
        remedy = "fewer lanes" if lanes > groups else "smaller row groups or more lanes"
        seen = f"{first['stream']:.3g} distinct slides where uniform sampling has {first['uniform']:.3g}"
        yield "mixing", f"a batch holds {seen}; {remedy} would mix better"


def _named(records: list[dict[str, Any]]) -> str:
    """The first few of some files with what is wrong with them."""
    shown = [f"{record.get('name') or record.get('file')} ({record['reason']})" for record in records[:_NAMED]]
    return "; ".join([*shown, f"and {len(records) - _NAMED} more"] if len(records) > _NAMED else shown)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python -m dinov2.data.inspect",
        __doc__.rpartition("\n\n")[0],
        "/data/tiles",
        "/data/tiles --batch 3072 --ranks 64 --json report.json",
        epilog="Exit status: 0 usable for training, 1 not usable (with the reason), 2 wrong arguments or no dataset.",
    )
    parser.add_argument("source", metavar="SRC", help=NAMES)
    for option in fields(Training):
        parser.add_argument("--" + option.name.replace("_", "-"), default=option.default, **option.metadata)
    text = "what SRC is, where it is not recognised"
    parser.add_argument("--kind", choices=("auto", *SOURCES), default="auto", help=text)
    parser.add_argument("--groups-file", metavar="FILE", default="", help="as data.groups_file")
    parser.add_argument("--patient-pattern", metavar="REGEX", default="", help="as data.patient_pattern")
    text = "name of the image column, where it is not a known one"
    parser.add_argument("--image-column", metavar="NAME", default="", help=text)
    text = "write the report there as JSON, too; it must not exist; '-': JSON instead of text"
    parser.add_argument("--json", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    if not args.memory_gib:
        parser.error("--memory-gib is 0, but it must be positive")
    if args.batch % args.ranks:
        parser.error(f"--batch {args.batch} cannot be split over {args.ranks} --ranks; a multiple is expected")
    if args.json not in (None, "-") and Path(args.json).exists():
        parser.error(f"--json '{args.json}' exists; name a new file")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; see `dinov2.utils.cli.run_command`."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # the report says what is logged below

    def body() -> int:
        training = Training(**{option.name: getattr(args, option.name) for option in fields(Training)})
        kind = args.kind if args.kind != "auto" else _kind_of(args.source)
        if kind == "parquet":
            report = inspect_dataset(args.source, training, args.image_column)
        else:
            keys = {name: getattr(args, name) for name in ("image_column", "groups_file", "patient_pattern")}
            report = inspect_source(args.source, kind, training, **keys)
        text = json.dumps(report, indent=2) + "\n"
        lines = [f"{about:<16} {line}\n" for about, line in describe(report)]
        sys.stdout.writelines([text] if args.json == "-" else lines)
        if args.json not in (None, "-"):
            write_text(Path(args.json), text)
        return DONE if report["verdict"]["usable"] else FAILURES

    return run_command(body, logger)


def _kind_of(path: str) -> str:
    try:
        return recognise(path)
    except (ValueError, FileNotFoundError):
        if os.path.isdir(path) or os.path.isfile(path):
            raise
        return "parquet"  # whose storages say best what is wrong with a name


def describe(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as lines of text: what each is about, and what there is to say."""
    yield "dataset", report["place"]
    if "kind" in report:
        yield "kind", report["kind"]
    else:
        yield "files", f"{report['files']:,}, {_size(report['bytes'])}"
    for kind in ("unreadable", "no_images", "wrong_schema"):
        yield from (
            (f"  {kind.replace('_', ' ')}", f"{item['name']}: {item['reason']}") for item in report.get(kind, ())
        )
    yield "rows", f"{report['rows']:,}"
    if report["rows"]:
        yield from _describe_layout(report)
        stream = report["stream"]
        layout = f"{stream['lanes']} lanes, blocks of {stream['block_rows']} rows"
        yield "sample order", f"batch {stream['batch']}, {layout}"
        for row in stream["distinct"]:
            slides = f"{row['stream']:,.0f} distinct slides; uniform sampling: {row['uniform']:,.0f}"
            yield f"  {row['steps']} step" + "s" * (row["steps"] > 1), slides
        held = _size(stream["memory_bytes_per_rank"])
        yield "  memory", f"up to {held} of encoded images on each of {stream['ranks']} processes"
    verdict = report["verdict"]
    yield "verdict", "usable for training" if verdict["usable"] else "not usable for training"
    for finding in verdict["reasons"] + verdict["advice"]:
        yield "  " + finding["code"].replace("_", " "), finding["text"]


def _describe_layout(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    groups, images, slides = (report[key] for key in ("row_groups", "images", "slides"))
    yield "row groups", f"{groups['count']:,} of {_show_spread(groups['rows'])} rows"
    yield "  images", f"{_show_spread(groups['image_bytes'], _size)} before compression"
    kinds = ", ".join(f"{count} {kind}" for kind, count in (images["kinds"] | images["sizes"]).items())
    if "stored" in report:
        yield from _describe_columns(report, kinds)
    else:
        yield "images", f"sampled: {kinds}"
    if images["corrupt"]:
        yield "  corrupt", f"{len(images['corrupt'])} of these or their row groups"
    if "per_file" in slides:
        unknown = slides["unknown_row_groups"]
        guess = f"; {unknown:,} row groups of unknown slides count as one each" if unknown else ""
        yield "slides", f"{slides['distinct']:,}, {_show_spread(slides['per_file'])} per file{guess}"
    else:
        yield "slides", f"{slides['distinct']:,} of {slides['patients']:,} patients"
    yield "  mixed", f"{slides['mixed_row_groups']:,} of {groups['count']:,} row groups"


def _describe_columns(report: dict[str, Any], kinds: str) -> Iterator[tuple[str, str]]:
    groups, stored = report["row_groups"], report["stored"]
    for schema in report["schemas"]:
        columns = ", ".join(f"{name} {kind}" for name, kind in schema["columns"].items())
        yield "columns", f"{columns} ({schema['files']:,} files)"
    yield "image column", ", ".join(stored["columns"])
    for key in ("encodings", "compression"):
        yield f"  {key}", ", ".join(f"{name} ({count:,} row groups)" for name, count in stored[key].items())
    for key in ("dictionary", "page_index"):
        yield f"  {key.replace('_', ' ')}", f"{stored[f'with_{key}']:,} of {groups['count']:,} row groups"
    yield "images", f"about {_size(stored['bytes_per_image'])} each; sampled: {kinds or 'none'}"


def _show_spread(values: dict[str, float], show: Any = "{:,.0f}".format) -> str:
    if values["min"] == values["max"]:
        return show(values["min"])
    return f"{show(values['min'])} to {show(values['max'])} (median {show(values['median'])})"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


if __name__ == "__main__":
    raise SystemExit(main())
