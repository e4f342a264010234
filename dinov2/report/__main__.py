"""A page about runs: ``python -m dinov2.report RUN [RUN ...] [--watch] [--output FILE]``.

It holds curves, facts, probes and configurations of one or several runs, and pictures of what the exports of one make
of tiles, in one file that needs nothing else. What is not there, or cannot be read, is named on the page.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2.report import PAGE_OF_SEVERAL
from dinov2.utils.cli import add_options, command_parser, run_command

logger = logging.getLogger("dinov2.report")


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
    parser.add_argument("--port", type=_port, default=8123, help="of --watch; 0 takes a free one (%(default)s)")
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
        from dinov2.report import make  # takes seconds, which help and mistakes need not wait for

        (make.watch if args.watch else make.make_report)(args)

    return run_command(body, logger)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"it is {text}, but it must be in 0 to 65535")
    return number


_port.__name__ = "port"  # what argparse calls it where a text is no number


if __name__ == "__main__":
    sys.exit(main())
