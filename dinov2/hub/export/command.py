"""The command line of `python -m dinov2.export`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.hub.architecture import arguments_of, description
from dinov2.hub.export.formats import DTYPES, Colours, files_for, resampled_by, with_image_size
from dinov2.hub.export.verify import (
    LIBRARIES,
    TOLERANCES,
    agreement,
    open_export,
    read_tiles,
    require_library,
    tokens,
)
from dinov2.hub.record import trained_with
from dinov2.hub.save import write_new
from dinov2.hub.teacher import load_teacher
from dinov2.logging import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer

USER_ERROR = 2
"""Exit status where one sentence has said what the user can mend."""
_DISAGREES = 1

logger = logging.getLogger("dinov2")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.export",
        description="Write a teacher's backbone for Meta's code and eva (meta), timm, or transformers (hf).",
        epilog="Exit status: 0 written, 1 written but --verify found a difference, 2 not written, with the reason.",
    )
    parser.add_argument("--checkpoint", required=True, help="any file that dinov2.hub.load_teacher opens")
    parser.add_argument("--format", required=True, choices=LIBRARIES, help="whose names and files")
    parser.add_argument("--output", required=True, type=Path, help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all weights (%(default)s)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="resample the position grid to square images of this side; the file's own where left out",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{what} to normalise images with; that of training or ImageNet's where left out",
        )
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="TILES",
        help="open the export with its library and compare all tokens on images of this folder, or on scikit-image's "
        "micrograph",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_arguments(argv)
    setup_logging()
    try:
        if args.verify is not None:
            require_library(args.format)
            tiles = read_tiles(args.verify or None)
        described = description(args.checkpoint)
        model = load_teacher(args.checkpoint)
        if args.image_size is not None:
            with_image_size(model, args.image_size)
        colours = _colours(args)
        _write(args, model, colours, described)
        alike = _resamples_alike(args.format, model)
        if args.verify is None:
            return 0
        side, arguments = model.patch_embed.img_size, arguments_of(model)
        # One patch less: the position grid is resampled.
        sides = [side] if not alike or side == model.patch_size else [side, side - model.patch_size]
        expected = {side: tokens(model, tiles, side, colours) for side in sides}
        del model  # one at a time: the largest takes 9 GB
        return _verify(args, open_export(args.format, args.output, arguments), expected, tiles, colours)
    except (ValueError, OSError, ImportError) as error:
        logger.error("%s", error)
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR


def _colours(args: argparse.Namespace) -> Colours:
    """Those asked for, or of training, or ImageNet's."""
    trained = trained_with(args.checkpoint)
    colours = Colours(
        args.mean or trained.get("mean", IMAGENET_MEAN), args.std or trained.get("std", IMAGENET_STD)
    )
    try:
        fit = all(
            0 <= mean <= 1 and 0 < std <= 1 for mean, std in zip(colours.mean, colours.std, strict=True)
        )
    except (TypeError, ValueError):
        fit = False
    if not fit:
        raise ValueError(
            f"{colours} does not normalise values in [0, 1]; a mean and a positive std of such are expected."
        )
    return colours


def _write(
    args: argparse.Namespace, model: DinoVisionTransformer, colours: Colours, described: Mapping[str, Any]
) -> None:
    files = files_for(args.format, model, DTYPES[args.dtype], colours, described)
    done = "wrote" if write_new(args.output, files) else "already there:"
    sys.stdout.write(f"{done} {', '.join(files)} in {args.output}\n")


def _resamples_alike(target: str, model: DinoVisionTransformer) -> bool:
    """Whether the library that verifies resamples positions as the teacher does; warns where readers do not."""
    own = (model.interpolate_antialias, model.interpolate_offset)
    theirs = resampled_by(target, model.num_register_tokens)
    if own != theirs:
        side = model.patch_embed.img_size
        logger.warning(
            "For images of other than %d px %s resamples positions with antialias=%s, offset=%s, this teacher with "
            "antialias=%s, offset=%s: outputs will differ there; export with --image-size for the size in use.",
            side, "Meta's model" if target == "meta" else LIBRARIES[target], *theirs, *own,
        )  # fmt: skip
    return own == resampled_by("timm" if target == "meta" else target, model.num_register_tokens)


def _verify(
    args: argparse.Namespace,
    theirs: nn.Module,
    expected: Mapping[int, Tensor],
    tiles: Sequence[np.ndarray],
    colours: Colours,
) -> int:
    """Report how far the export is from the teacher's tokens for images of these sides."""
    library = LIBRARIES[args.format]
    found = {
        side: agreement(of_ours, tokens(theirs, tiles, side, colours)) for side, of_ours in expected.items()
    }
    for side, result in found.items():
        sys.stdout.write(f"{library}, {len(tiles)} tiles of {side} px: {result}\n")
    if all(result.holds(args.dtype) for result in found.values()):
        return 0
    relative, cosine = TOLERANCES[args.dtype]
    logger.error(
        "%s disagrees: a difference of at most %g of the largest output and a cosine of at least %g are "
        "expected of %s.",
        library, relative, cosine, args.dtype,
    )  # fmt: skip
    return _DISAGREES
