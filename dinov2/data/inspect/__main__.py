"""Look at a Parquet dataset before training on it: files, row groups, images, slides, how well the sample order would
mix them, and a verdict. Reads all footers, some images, and slide names where footers do not tell them.

    python -m dinov2.data.inspect SRC
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinov2.data.inspect.report import Training, inspect_dataset
from dinov2.utils.cli import DONE, FAILURES, run_command
from dinov2.utils.files import write_text

logger = logging.getLogger("inspect")

_NUMBERS = (  # field of Training, least value, help
    ("batch", 1, "global batch size"),
    ("ranks", 1, "processes that share it"),
    ("lanes", 0, "streams read side by side and interleaved; 0: 8 x batch or what rows and memory allow"),
    ("block_rows", 1, "rows shuffled together"),
    ("memory_gib", 0, "most that the reader of one process may hold"),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    default = Training()
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.data.inspect",
        description=__doc__.rpartition("\n\n")[0],
        epilog="Exit status: 0 usable for training, 1 not usable (with the reason), 2 wrong arguments or no dataset.",
    )
    parser.add_argument(
        "source", metavar="SRC",
        help="folder (with subfolders), glob or file; org/name[@revision] on the Hugging Face hub; s3:// ...",
    )  # fmt: skip
    options = {name: "--" + name.replace("_", "-") for name, _, _ in _NUMBERS}
    for name, _, text in _NUMBERS:
        value = getattr(default, name)
        parser.add_argument(options[name], type=type(value), default=value, help=f"{text} (%(default)s)")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the report there as JSON, too; it must not exist; '-': JSON instead of text",
    )
    args = parser.parse_args(argv)
    for name, least, _ in _NUMBERS:
        if not getattr(args, name) >= least:
            parser.error(f"{options[name]} is {getattr(args, name)}, but it must be at least {least}")
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
        report = inspect_dataset(args.source, Training(**{name: getattr(args, name) for name, _, _ in _NUMBERS}))
        text = json.dumps(report, indent=2) + "\n"
        sys.stdout.writelines(
            [text] if args.json == "-" else (f"{what:<16} {text}\n" for what, text in describe(report))
        )
        if args.json not in (None, "-"):
            write_text(Path(args.json), text)
        return DONE if report["verdict"]["usable"] else FAILURES

    return run_command(body, logger)


def describe(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as lines of text: what each is about, and what there is to say."""
    yield "dataset", report["place"]
    yield "files", f"{report['files']:,}, {_size(report['bytes'])}"
    for kind in ("unreadable", "wrong_schema"):
        yield from ((f"  {kind.replace('_', ' ')}", f"{item['name']}: {item['reason']}") for item in report[kind])
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
    groups, stored, images, slides = (report[key] for key in ("row_groups", "stored", "images", "slides"))
    yield "row groups", f"{groups['count']:,} of {_spread(groups['rows'])} rows"
    yield "  images", f"{_spread(groups['image_bytes'], _size)} before compression"
    for schema in report["schemas"]:
        columns = ", ".join(f"{name} {kind}" for name, kind in schema["columns"].items())
        yield "columns", f"{columns} ({schema['files']:,} files)"
    yield "image column", ", ".join(stored["columns"])
    for key in ("encodings", "compression"):
        yield f"  {key}", ", ".join(f"{name} ({count:,} row groups)" for name, count in stored[key].items())
    for key in ("dictionary", "page_index"):
        yield f"  {key.replace('_', ' ')}", f"{stored[f'with_{key}']:,} of {groups['count']:,} row groups"
    kinds = ", ".join(f"{count} {kind}" for kind, count in (images["kinds"] | images["sizes"]).items())
    yield "images", f"about {_size(stored['bytes_per_image'])} each; sampled: {kinds or 'none'}"
    if images["corrupt"]:
        yield "  corrupt", f"{len(images['corrupt'])} of these or their row groups"
    unknown = slides["unknown_row_groups"]
    guess = f"; {unknown:,} row groups of unknown slides count as one each" if unknown else ""
    yield "slides", f"{slides['distinct']:,}, {_spread(slides['per_file'])} per file{guess}"
    yield "  mixed", f"{slides['mixed_row_groups']:,} of {groups['count']:,} row groups"


def _spread(values: dict[str, float], show: Any = "{:,.0f}".format) -> str:
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
