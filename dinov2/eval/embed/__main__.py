"""Embed images, Parquet datasets or slides: ``python -m dinov2.eval.embed --checkpoint T --input SRC --output OUT``.

The output is a folder of files, one per slide or per few thousand images, each written beside and renamed when whole:
the same command goes on where it was stopped. Under ``torchrun`` the processes share the files out.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dinov2.data.slides.tissue import add_rule_options
from dinov2.eval.embed.files import ENDINGS, STORED
from dinov2.eval.embed.inputs import KINDS, Grid
from dinov2.logging import setup_logging
from dinov2.utils import cli

logger = logging.getLogger("dinov2")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description = "Embed images, Parquet datasets or slides with a teacher."
    parser = cli.command_parser(
        "python -m dinov2.eval.embed",
        description,
        "--checkpoint output --input /data/slides --output embeddings --format hdf5 --mpp 0.5",
        "--checkpoint output --input /data/tiles --output embeddings",
    )
    add, grid = parser.add_argument, Grid()
    cli.add_options(parser, "--checkpoint")
    add(
        "--input", required=True, metavar="SRC",
        help="folder (with subfolders) of images, Parquet shards or slides; one of these; a .txt or .csv list of "
        "slides; a glob, hub id or URL of Parquet shards",
    )  # fmt: skip
    add("--output", required=True, type=Path, metavar="OUT", help="folder: new, empty, or of the same command")
    add("--kind", choices=KINDS, help="of the input; needed for files of TIFF alone")
    add("--format", choices=ENDINGS, default="parquet", help="of the files (%(default)s)")
    cli.add_options(parser, "--pooling", "--dtype")
    add("--store", choices=STORED, help="of the embeddings (fp32 for HDF5 and --dtype fp32, else fp16)")
    cli.add_options(parser, "--device")
    add("--batch-size", type=cli.at_least(1), default=64, help="tiles in a forward pass (%(default)s)")
    cli.add_options(parser, "--workers", default=8, help="threads of each process that read (%(default)s)")
    add("--rows-per-file", type=cli.at_least(1), default=2048, help="of images and Parquet rows (%(default)s)")
    about = "scale the largest centred square to this side; default: cut to whole patches"
    cli.add_options(parser, "--image-size", help=about)
    cli.add_options(parser, "--mean", "--std")
    add("--skip-damaged", action="store_true", help="leave out and count what cannot be read")
    slides = parser.add_argument_group("slides")
    add = slides.add_argument
    add("--mpp", type=float, default=grid.mpp, help="um per px of the tiles (%(default)s)")
    add("--tile-size", type=int, default=grid.tile_size, help="side of a tile in px (%(default)s)")
    add("--stride", type=int, help="px from tile to tile (the tile size)")
    add("--min-tissue", type=float, default=grid.min_tissue, help="least fraction of tissue (%(default)s)")
    add_rule_options(slides)
    cli.add_options(slides, "--slide-root", "--mpp-file", "--mpp-tolerance")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    setup_logging()
    return cli.run_command(lambda: _run(args), logger, resumable=True)


def _run(args: argparse.Namespace) -> None:
    from dinov2.eval.embed.start import start  # takes seconds, which help and mistakes need not wait for

    start(args)


if __name__ == "__main__":
    sys.exit(main())
