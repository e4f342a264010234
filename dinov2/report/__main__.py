"""A page about runs: ``python -m dinov2.report RUN [RUN ...] [--watch] [--output FILE]``.

It holds curves, facts, probes and configurations of one or several runs, and pictures of what the exports of one make
of tiles, in one file that needs nothing else. What is not there, or cannot be read, is named on the page.
"""

import argparse
import io
import logging
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dinov2.report.page import Pictures, is_ours, log_tables, read_runs, render, tables_of, write_page
from dinov2.report.records import SIGNS, Run, exports_of
from dinov2.report.serve import HOST, PageServer, state_of
from dinov2.utils.cli import add_options, command_parser, run_command
from dinov2.utils.environment import DeviceError

logger = logging.getLogger("dinov2.report")

PAGE = "report.html"
PAGE_OF_SEVERAL = "pathfm_report.html"


def make_report(args: argparse.Namespace) -> None:
    """Write the page; see `main` for the arguments."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = command_parser(
        "python -m dinov2.report",
        "A page about runs: curves, health, probes, facts; of one run also crops, maps and neighbours.",
        "output --watch",
        "run_a run_b --output compared.html",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a training run")
    parser.add_argument("--tiles", help="Parquet folder of tiles to embed (default: validation or training tiles)")
    parser.add_argument(
        "--output",
        type=Path,
        help="page (*.html), or folder for it, its pictures and embeddings.npy (default: RUN/report; of several runs "
        f"./{PAGE_OF_SEVERAL})",
    )
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine; it follows the run")
    parser.add_argument("--port", type=int, default=8123, help="of --watch; 0 takes a free one (%(default)s)")
    parser.add_argument("--price", type=float, help="of an hour of one GPU, for the cost so far")
    parser.add_argument("--no-pictures", action="store_true", help="leave out all that needs tiles or a teacher")
    add_options(parser, "--device")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)

    def body() -> None:
        args.runs = [run.expanduser() for run in args.runs]
        for run in args.runs:
            if not run.is_dir():
                raise ValueError(f"'{run}' is no folder; give the output folder of a training run.")
        (watch if args.watch else make_report)(args)

    return run_command(body, logger, errors=(DeviceError,))


if __name__ == "__main__":
    sys.exit(main())
