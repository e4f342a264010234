"""The page about runs: made once, or served while a run goes on."""

import argparse
import io
import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dinov2.report import PAGE, PAGE_OF_SEVERAL
from dinov2.report.page import Pictures, is_ours, log_tables, read_runs, render, tables_of, write_page
from dinov2.report.records import SIGNS, Run, exports_of
from dinov2.report.serve import HOST, PageServer, state_of

logger = logging.getLogger("dinov2.report")


def make_report(args: argparse.Namespace) -> None:
    """Write the page; the command's help tells of the arguments."""
    output = _checked_output(args.output)
    runs = read_runs(args.runs, args.price)
    pictures = _pictures(args, runs)
    log_tables(tables_of(runs) | pictures.tables)
    for text in [text for run in runs for text in run.missing] + pictures.missing:
        logger.info("Not shown. %s", text)
    page = render(runs, pictures)
    if output:
        path = output if output.suffix.lower() == ".html" else output / PAGE
        write_page(path, page, {} if path == output else _beside(runs, pictures))
    else:
        path = _write_where_possible(args.runs, runs, pictures, page)
    logger.info("Report: %s (%.1f MB)", path, len(page.encode()) / 1e6)


def _checked_output(output: Path | None) -> Path | None:
    """The place for the page, if it may be taken."""
    if output is None:
        return None
    output = output.expanduser()
    if output.suffix.lower() == ".html":
        if output.exists() and not is_ours(output):
            raise ValueError(f"'{output}' is not a page of an earlier report; give --output a new name.")
    elif output.is_file():
        raise ValueError(f"'{output}' is a file, and no page by its name; give --output a folder, or a name in .html.")
    elif output.is_dir() and any(output.iterdir()) and not (output / PAGE).exists():
        raise ValueError(f"Folder '{output}' holds other files; give --output a new folder, or a name in .html.")
    return output


def _write_where_possible(folders: Sequence[Path], runs: Sequence[Run], pictures: Pictures, page: str) -> Path:
    """Write beside the run, in the current folder for several, or for what is no run's; else among temporary files."""
    beside: dict[str, bytes] = {}
    places = [Path(PAGE_OF_SEVERAL)]
    if len(folders) == 1 and any((folders[0] / sign).exists() for sign in SIGNS):
        places.insert(0, folders[0] / "report" / PAGE)
        beside = _beside(runs, pictures)
    for path in places:
        try:
            if path.exists() and not is_ours(path) and path.name == PAGE_OF_SEVERAL:
                logger.warning("'%s' is not a page of an earlier report, and is left as it is.", path)
                continue
            write_page(path, page, beside if path.name == PAGE else {})
        except OSError as error:
            logger.warning("'%s' cannot be written (%s).", path, error.strerror)
        else:
            return path
    path = Path(tempfile.mkdtemp(prefix="pathfm_")) / PAGE
    write_page(path, page, {})
    return path


def _pictures(args: argparse.Namespace, runs: Sequence[Run], device: str | None = None) -> Pictures:
    if args.no_pictures:
        return Pictures()
    if len(runs) > 1:
        return Pictures(missing=["Pictures: they are drawn for one run at a time; give the folder of one."])
    if not any((runs[0].folder / sign).exists() for sign in SIGNS):
        return Pictures()
    from dinov2.report.pictures import draw_pictures  # imports that take seconds, and that curves do without

    return draw_pictures(runs[0].folder, args.tiles, args.device or device)


def _beside(runs: Sequence[Run], pictures: Pictures) -> dict[str, bytes]:
    """Files for other use, by name: pictures, curves as one, embeddings."""
    from dinov2.report.figures import as_png, draw_curves

    files = {name: png for name, (_, _, png) in pictures.images.items()}
    if runs[0].metrics:
        files["loss_curves.png"] = as_png(draw_curves(runs[0].metrics))
    if pictures.embeddings is not None:
        buffer = io.BytesIO()
        np.save(buffer, pictures.embeddings)
        files["embeddings.npy"] = buffer.getvalue()
    return files


def watch(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Pictures are drawn on the CPU unless told, and anew for a new export alone."""
    drawn: dict[tuple[Path, ...], Pictures] = {}

    def make(state: str) -> str:
        runs = read_runs(args.runs, args.price)
        exports = tuple(exports_of(runs[0].folder))
        if exports not in drawn:
            drawn.clear()
            drawn[exports] = _pictures(args, runs, device="cpu")
        return render(runs, drawn[exports], state)

    with PageServer(args.port, make, partial(state_of, args.runs)) as server:
        server.page()  # what is wrong with the arguments is to be said here
        logger.info("http://%s:%d shows the report and follows the run; Ctrl-C ends it.", HOST, server.server_port)
        server.serve_forever()
