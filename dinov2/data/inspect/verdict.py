"""What a report on a dataset means: can training use it, and what would make it better."""

from collections.abc import Iterator
from typing import Any, NamedTuple

_GIANT = 1 << 25  # bytes of images in a row group; 64 PNG tiles of 224 px take a fifth
_REPACK_SPEED = 1e8  # bytes per second and core
_NAMED = 3  # files named in a sentence
_WELL_MIXED = 0.9  # of the distinct slides of uniform sampling


class Finding(NamedTuple):
    """One line of the verdict; `code` is for programs."""

    code: str
    text: str


def verdict(report: dict[str, Any], batch: int) -> dict[str, Any]:
    """Judge a report.

    Returns:
        "usable": bool, "reasons": why not, "advice": what else to know; the last two as code and text.
    """
    reasons = [finding._asdict() for finding in _reasons(report)]
    advice = [finding._asdict() for finding in _advice(report, batch)] if report["rows"] else []
    return {"usable": not reasons, "reasons": reasons, "advice": advice}


def _reasons(report: dict[str, Any]) -> Iterator[Finding]:
    wrong, unreadable = report["wrong_schema"], report["unreadable"]
    if wrong:
        yield Finding(
            "wrong_schema", f"{len(wrong)} files have a wrong schema: {_named(wrong)}; take them away"
        )
    if len(unreadable) == report["files"]:
        yield Finding("no_readable_file", f"no file has a readable footer: {_named(unreadable)}")
    elif not report["rows"]:
        yield Finding("no_rows", f"there are 0 rows in {report['files']} files")
    if not report["rows"]:
        return
    images, refused = report["images"], report["stream"]["refused"]
    if images["damaged"] and not images["sizes"]:
        yield Finding(
            "undecodable", f"none of the sampled images can be decoded: {_named(images['damaged'])}"
        )
    if refused and not wrong:  # which is then what is refused
        yield Finding("refused", refused)


def _advice(report: dict[str, Any], batch: int) -> Iterator[Finding]:
    yield from _damage(report)
    yield from _layout(report)
    yield from _mixing(report, batch)
    kinds = report["images"]["kinds"]
    if "png" in kinds:
        yield Finding(
            "png",
            "PNG tiles take 4 to 6 times the CPU of JPEG ones to decode and about 3 times the bytes; if the CPUs "
            "cannot keep up, build the shards anew with --encoding jpeg (which is lossy)",
        )
    if len(kinds) > 1 or len(report["images"]["sizes"]) > 1:
        found = ", ".join([*kinds, *report["images"]["sizes"]])
        yield Finding(
            "mixed_images", f"images differ in kind or size ({found}); training takes them as they come"
        )


def _damage(report: dict[str, Any]) -> Iterator[Finding]:
    unreadable, images = report["unreadable"], report["images"]
    if unreadable:
        yield Finding(
            "damaged_files",
            f"{len(unreadable)} files cannot be read and would be left out: {_named(unreadable)}",
        )
    if images["damaged"] and images["sizes"]:
        yield Finding(
            "damaged_images",
            f"{len(images['damaged'])} sampled images or row groups are damaged: {_named(images['damaged'])}; training "
            "stops above data.max_corrupt_fraction",
        )


def _layout(report: dict[str, Any]) -> Iterator[Finding]:
    groups, stored = report["row_groups"], report["stored"]
    largest, size = groups["image_bytes"]["max"], report["bytes"]
    hours = size / _REPACK_SPEED / 3600
    cost = f"python -m dinov2.data.repack SRC DST takes about {hours:.1g} core-hours and {size / 1e9:.3g} GB"
    if largest > _GIANT:
        how = (
            "local files without compression or with snappy are read in parts, others as whole pages"
            if report["local"]
            else "over a network each row group is fetched and held whole, so memory limits the lanes"
        )
        yield Finding(
            "repack",
            f"row groups hold up to {largest / 1e6:.0f} MB of images: {how}; repack recommended, {cost}",
        )
    elif stored["with_dictionary"]:
        yield Finding(
            "dictionary",
            f"{stored['with_dictionary']} of {groups['count']} row groups keep images in dictionary pages, which are "
            f"read whole for any row; {cost}",
        )
    if set(stored["compression"]) - {"UNCOMPRESSED"} and "raw" not in report["images"]["kinds"]:
        yield Finding(
            "compression",
            f"the image column is compressed ({', '.join(stored['compression'])}), which costs time and makes PNG and "
            "JPEG no smaller",
        )


def _mixing(report: dict[str, Any], batch: int) -> Iterator[Finding]:
    stream, rows = report["stream"], report["rows"]
    if rows < 8 * batch:
        yield Finding(
            "few_rows", f"{rows} rows are fewer than 8 global batches of {batch}: fewer lanes, long repeats"
        )
    elif 2 * stream["lanes"] < min(16 * batch, stream["units"]):
        yield Finding("lanes", f"{stream['lanes']} lanes are read side by side where {8 * batch} mix better")
    first = stream["distinct"][0]
    if first["stream"] < _WELL_MIXED * first["uniform"]:
        # Lanes that begin in the same row group are neighbours in a batch.
        remedy = "fewer lanes" if stream["lanes"] > stream["units"] else "smaller row groups or more lanes"
        yield Finding(
            "mixing",
            f"a batch holds {first['stream']:.3g} distinct slides where uniform sampling has {first['uniform']:.3g}; "
            f"{remedy} would mix better",
        )


def _named(records: list[dict[str, Any]]) -> str:
    """The first few of some files with what is wrong with them."""
    shown = "; ".join(
        f"{record.get('name') or record.get('file')} ({record['reason']})" for record in records[:_NAMED]
    )
    return shown + (f"; and {len(records) - _NAMED} more" if len(records) > _NAMED else "")
