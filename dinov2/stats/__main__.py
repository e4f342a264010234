"""Mean and standard deviation of the colours of tiles, to normalise with: ``python -m dinov2.stats DATASET``.

The tiles are those that a run with the same configuration would train on: all of them, or a sample, drawn by a seed.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from dinov2.configs import recipes
from dinov2.utils.cli import add_options, at_least, command_parser, run_command

logger = logging.getLogger("stats")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python -m dinov2.stats",
        __doc__.partition(": ")[0] + ".\n\n" + __doc__.partition("\n\n")[2].strip(),
        "/data/tiles",
        "data.path=/data/tiles data.validation_fraction=0.05 --config-file vits14_reg4 --tiles 0",
        "/data/slides online.mpp=[0.5] data.tile_size=256 --tiles 2000 --json tcga.json",
    )
    add = parser.add_argument
    add(
        "words", nargs="*", metavar="DATASET | section.key=value", help="data.path, and other values of a configuration"
    )
    add("--config-file", metavar="FILE", help=f"YAML file, or recipe: {', '.join(recipes())}")
    add("--tiles", type=at_least(0), default=10_000, metavar="N", help="sample of so many; 0: all (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of the sample (%(default)s)")
    add("--json", metavar="FILE", help="write there the figures in full, too; '-': in place of the text")
    add_options(parser, "--workers", help="threads (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [word if "=" in word else f"data.path={json.dumps(word)}" for word in args.words]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `dinov2.utils.cli.run_command`."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")

    def body() -> None:
        from dinov2.stats.measure import measure  # with PyTorch, which no mistake on the command line has to wait for

        measure(args)

    return run_command(body, logger)


if __name__ == "__main__":
    sys.exit(main())
