"""Write a teacher for other libraries: ``python -m dinov2.export --checkpoint T --format hf --output DIR``.

`save_teacher` writes the file that training exports, which this and `dinov2.hub.load_teacher` open.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dinov2.hub.export import verify
from dinov2.hub.export.formats import arguments_of, files_for, fit_to_images, resampled_by, timm_file
from dinov2.hub.layouts import is_vit
from dinov2.hub.layouts_dinov3 import is_dinov3, rounding_of_periods
from dinov2.hub.locate import teacher_file
from dinov2.hub.pixels import Colours
from dinov2.hub.record import normalisation
from dinov2.hub.save import save_teacher, write_new
from dinov2.hub.teacher import description, load_teacher
from dinov2.logging import setup_logging
from dinov2.utils import cli
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.provenance import how_to_install

__all__ = ["main", "save_teacher"]

logger = logging.getLogger("dinov2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = cli.command_parser(
        "python -m dinov2.export",
        "Write a teacher's backbone for Meta's code and eva (meta), timm, or transformers (hf).",
        "--checkpoint output --format hf --output teacher_hf --verify",
        epilog="Exit status: 0 written, 1 written but --verify found a difference, 2 not written, with the reason.",
    )
    cli.add_options(parser, "--checkpoint")
    parser.add_argument("--format", required=True, choices=verify.LIBRARIES, help="whose names and files")
    parser.add_argument("--output", required=True, type=Path, help="a new or empty folder")
    cli.add_options(parser, "--dtype", default="fp32", help="of all weights (%(default)s)")
    about = "resample the position grid to square images of this side (default: as in the file)"
    cli.add_options(parser, "--image-size", help=about)
    cli.add_options(parser, "--mean", "--std")
    about = "open the export with its library and compare all tokens on images of this folder, or on scikit-image's"
    parser.add_argument("--verify", nargs="?", const="", metavar="TILES", help=f"{about} micrograph")
    args = parser.parse_args(argv)
    setup_logging()
    return cli.run_command(lambda: _export(args), logger)


def _export(args: argparse.Namespace) -> int:
    args.checkpoint = teacher_file(args.checkpoint)
    library = verify.LIBRARIES[args.format]
    if args.verify is not None:
        if find_spec(library) is None:
            needs = f"--verify of --format {args.format} needs {library}"
            raise ImportError(f"{needs}, which is not installed; {how_to_install('export')}.")
        tiles = verify.read_tiles(args.verify or None)
    described = description(args.checkpoint)
    model = load_teacher(args.checkpoint)
    if args.image_size is not None:
        fit_to_images(model, args.image_size)
    # Another backbone has a file and a JSON of its own names, which no library opens.
    is_known = is_vit(model) or is_dinov3(model)
    arguments = arguments_of(model) if is_known or args.verify is not None else None
    colours = Colours(*normalisation(args.checkpoint, args.mean, args.std)[:2])
    files = files_for(args.format, model, DTYPES[args.dtype], colours, described)
    if is_dinov3(model) and (rounding := rounding_of_periods(model)) > 1e-6:
        logger.warning(
            "The teacher's periods of rotary positions are rounded by up to %.1g of each, as in Meta's files; timm's "
            "and transformers' are exact, and outputs will differ a little.", rounding,
        )  # fmt: skip
    done = "wrote" if write_new(args.output, files) else "already there:"
    sys.stdout.write(f"{done} {', '.join(sorted(files))} in {args.output}\n")
    alike = not is_vit(model) or _resamples_alike(args.format, arguments)
    if args.verify is None:
        return cli.DONE
    side, patch = arguments["img_size"], arguments["patch_size"]
    # One patch less: the position grid is resampled.
    sides = [side] if not alike or side == patch else [side, side - patch]
    expected = [verify.tokens(model, tiles, side, colours) for side in sides]
    of_timm = timm_file(model, colours) if args.format == "meta" else {}
    del model  # one at a time: the largest takes 9 GB
    theirs = verify.open_export(args.format, args.output, of_timm)
    holds = True
    for side, ours in zip(sides, expected, strict=True):
        found = verify.Agreement(ours, verify.tokens(theirs, tiles, side, colours))
        sys.stdout.write(f"{library}, {len(tiles)} tiles of {side} px: {found}\n")
        holds &= found.holds(args.dtype)
    if holds:
        return cli.DONE
    logger.error(
        "%s disagrees: a difference of at most %g of the largest output and a cosine of at least %g are expected of "
        "%s.",
        library, *verify.TOLERANCES[args.dtype], args.dtype,
    )  # fmt: skip
    return cli.FAILURES


def _resamples_alike(target: str, teacher: Mapping[str, Any]) -> bool:
    """Whether the library that verifies resamples positions as the teacher does; warns where readers do not."""
    own = (teacher["interpolate_antialias"], teacher["interpolate_offset"])
    registers = teacher["num_register_tokens"]
    theirs = resampled_by(target, registers)
    if own != theirs:
        logger.warning(
            "For images of other than %d px %s resamples positions with antialias=%s, offset=%s, this teacher with "
            "antialias=%s, offset=%s: outputs will differ there; export with --image-size for the size in use.",
            teacher["img_size"], "Meta's model" if target == "meta" else verify.LIBRARIES[target], *theirs, *own,
        )  # fmt: skip
    return own == resampled_by("timm" if target == "meta" else target, registers)


if __name__ == "__main__":
    sys.exit(main())
