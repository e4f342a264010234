"""Probes of a teacher's features: ``python -m dinov2.eval.probe --checkpoint T --data ROOT [...]``.

Embeds labelled tiles and probes the features: k-NN, linear heads, logistic regression, few-shot, RankMe, ODCorr, and
what else is registered. ``--compare`` adds another teacher and the differences; in place of a teacher, ``random:FILE``
is the start of a run, and ``colour`` and ``lbp`` are descriptors that nobody trained.
Under ``torchrun`` all processes share the work.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinov2.eval.datasets.benchmarks import BENCHMARKS
from dinov2.eval.datasets.labels import GROUPINGS
from dinov2.eval.probe.options import AGGREGATIONS, Probing, option_flags
from dinov2.extensions import PROBES
from dinov2.logging import setup_logging
from dinov2.utils import cli

logger = logging.getLogger("dinov2")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description = "Probe a teacher's features on labelled tiles."
    parser = cli.command_parser(
        "python -m dinov2.eval.probe",
        description,
        "--checkpoint output --data tissue=/data/tissue",
        "--checkpoint output --data bach=/data/bach --probes knn,linear_eva --output probes.csv",
    )
    default, add = Probing(), parser.add_argument
    cli.add_options(parser, "--checkpoint")
    add(
        "--compare", metavar="TEACHER",
        help="another teacher, on the same tiles and folds: adds its figures and the difference, --checkpoint less it",
    )  # fmt: skip
    add(
        "--data", required=True, nargs="+", metavar="[NAME=]ROOT",
        help=f"folder of class folders or of Parquet shards; {', '.join(BENCHMARKS)} as NAME take their own layout "
        "and split",
    )  # fmt: skip
    add("--grey", action="store_true", help="probe copies without colour and tone, too, as NAME_grey")
    add("--labels", metavar="CSV", help="file,label[,slide,patient,split] or slide_id,label[,patient,split]")
    add("--slide-regex", metavar="RE", help="group 1 is a tile's slide (default: its parent folder)")
    add("--probes", default=",".join(PROBES), help="comma-separated; linear is both linear ones (%(default)s)")
    add("--output", type=Path, metavar="FILE", help=".csv, appended to, or a new .json")
    add("--folds", type=int, default=default.folds, help="where tiles have no split (%(default)s)")
    add("--group", choices=GROUPINGS, help="never parted by folds (default: the widest known)")
    add("--aggregate", choices=AGGREGATIONS, default=default.aggregation, help="for labels per slide (%(default)s)")
    add("--limit", type=int, help="tiles taken of each split, at most (default: all)")
    add("--seed", type=int, default=default.seed, help="(%(default)s)")
    for name, (option, _) in option_flags().items():
        shown = ",".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        add(
            f"--{name.replace('_', '-')}", type=_reader(option.default), default=option.default,
            help=f"{option.metadata['key'].doc} ({shown})",
        )  # fmt: skip
    cli.add_options(parser, "--pooling", "--image-size", "--mean", "--std", "--device")
    add("--batch-size", type=int, default=64, help="tiles per forward pass (%(default)s)")
    cli.add_options(parser, "--dtype", default="fp32", help="of the matmuls (%(default)s)")
    return parser.parse_args(argv)


def _reader(default: Any) -> Callable[[str], Any]:
    """Reader of an option from the command line, lists being separated by commas."""
    if isinstance(default, tuple):
        return lambda text: tuple(type(default[0])(part) for part in text.split(","))
    return (lambda text: text.lower() in ("1", "true", "yes")) if isinstance(default, bool) else type(default)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    setup_logging()
    return cli.run_command(lambda: _run(args), logger)


def _run(args: argparse.Namespace) -> None:
    from dinov2.eval.probe.command import run  # imports torch, which help and mistakes need not wait for

    run(args)


if __name__ == "__main__":
    sys.exit(main())
