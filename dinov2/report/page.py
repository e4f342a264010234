"""The page about runs: one file of HTML that holds all it shows."""

import base64
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from dinov2.eval.probe.results import aligned
from dinov2.report.curves import COLOURS, Curves
from dinov2.report.records import Run, config_difference, read_run
from dinov2.utils.files import replacing

logger = logging.getLogger("dinov2.report")

Table = list[tuple[str, ...]]
"""A row of headings, then rows of cells."""

MARK = '<meta name="generator" content="Path-FM report">'
"""By which a page of ours is known, and may be replaced."""

_SPEEDS = {"img_per_s": "images per second", "data_wait_pct": "waiting for data, %", "memory_gib": "peak memory, GiB"}
_KINDS = {"median": np.nanmedian, "least": np.nanmin, "largest": np.nanmax}


@dataclass
class Pictures:
    """Pictures by file name, each with title, text for who does not see it, and the bytes of a PNG."""

    images: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)
    embeddings: np.ndarray | None = None  # (N, D) of the newest export
    tables: dict[str, Table] = field(default_factory=dict)  # by heading
    missing: list[str] = field(default_factory=list)

    def attempt(self, what: str, draw: Callable[[], Any]) -> Any:
        """What ``draw`` returns; None, and one more sentence of what is missing, if it cannot."""
        try:
            return draw()
        except (ValueError, OSError, ImportError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            logger.debug("%s:", what, exc_info=True)
            self.missing.append(f"{what}: {' '.join(str(error).split())[:300]}")
        return None


def read_runs(folders: Sequence[Path], price: float | None) -> list[Run]:
    """Read runs, named after their folders, with so much of the way to them as tells them apart."""
    ways = [folder.resolve().parts for folder in folders]
    names = ["/".join(way[-1:]) for way in ways]
    for length in range(2, 6):
        names = [
            name if names.count(name) == 1 else "/".join(way[-length:]) for way, name in zip(ways, names, strict=True)
        ]
    names = [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
    return [read_run(folder, name, price) for folder, name in zip(folders, names, strict=True)]


def tables_of(runs: Sequence[Run]) -> dict[str, Table]:
    """Tables by heading: losses, at first and at last; of one run also throughput, data wait and memory."""
    shown = [run for run in runs if run.metrics]
    if not shown:
        return {}
    heads = [(f"{run.name}, " if len(runs) > 1 else "") + f"step {run.metrics['step'][at]:.0f}"
             for run in shown for at in (0, -1)]  # fmt: skip
    names = dict.fromkeys(name for run in shown for name in run.metrics if name.endswith("_loss") and "/" not in name)
    rows = [
        (name, *(_figure(run.metrics[name][at]) if name in run.metrics else "" for run in shown for at in (0, -1)))
        for name in names
    ]
    tables: dict[str, Table] = {"First and last losses": [("", *heads), *rows]}
    if len(runs) == 1:
        metrics = shown[0].metrics
        speeds = [
            (words, *(_figure(kind(metrics[name]), ".1f") for kind in _KINDS.values()))
            for name, words in _SPEEDS.items()
            if name in metrics
        ]
        tables["Throughput"] = [("", *_KINDS), *speeds]
    return tables


def _figure(value: float, form: str = ".4f") -> str:
    return "not finite" if math.isnan(value) else format(value, form)


def render(runs: Sequence[Run], pictures: Pictures, state: str = "") -> str:
    """Render the page; with a ``state`` it asks its server every few seconds whether that is still the same."""
    curves, tables = Curves(runs), tables_of(runs) | pictures.tables
    sections = curves.sections()
    documents, item = curves.page_parts()
    environment = Environment(
        loader=PackageLoader("dinov2.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # Bokeh defines an object where it first comes up
    environment.filters["webp"] = lambda png: base64.b64encode(as_webp(png)).decode()
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        mark=Markup(MARK),
        runs=[(run, COLOURS[number % len(COLOURS)]) for number, run in enumerate(runs)],
        facts=_facts(runs),
        missing=[(run.name, text) for run in runs for text in run.missing] + [("", text) for text in pictures.missing],
        difference=config_difference(runs) if len(runs) > 1 else [],
        sections=sections,
        tables=tables,
        images=pictures.images,
        documents=documents,
        item=item,
        # Bokeh's own code; it holds no end of a script.
        bokeh=Markup(Resources(mode="inline", components=["bokeh"]).js_raw[0]) if documents else "",
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        state=state,
    )


def as_webp(png: bytes) -> bytes:
    """The same picture in about a quarter of the bytes."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "WEBP", quality=82, method=4)
    return buffer.getvalue()


def _facts(runs: Sequence[Run]) -> Table:
    headings = dict.fromkeys(heading for run in runs for heading in run.facts)
    return [(heading, *(run.facts.get(heading, "not noted") for run in runs)) for heading in headings]


def log_tables(tables: Mapping[str, Table]) -> None:
    """Tell tables on the console."""
    for title, table in tables.items():
        logger.info("%s", "\n  ".join([title, *aligned(table)]))


def is_ours(path: Path) -> bool:
    """Whether a file is a page that this module made."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(2000)


def write_page(path: Path, page: str, beside: Mapping[str, bytes]) -> None:
    """Write a page, and before it files of the same folder by name; what is there is replaced."""
    contents = {**beside, path.name: page.encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(*(path.parent / name for name in contents)) as partials:
        for partial, content in zip(partials if beside else [partials], contents.values(), strict=True):
            partial.write_bytes(content)
