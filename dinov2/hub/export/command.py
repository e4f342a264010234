"""The body of ``dinov2.export``: a teacher as files of another library, verified, with a card, on the hub if asked."""

import argparse
import logging
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from dinov2.extensions import EXPORTS
from dinov2.hub.export import verify
from dinov2.hub.export.card import CARD, model_card
from dinov2.hub.export.layout import Layout, arguments_of, fit_to_images
from dinov2.hub.export.push import push
from dinov2.hub.layouts import is_vit
from dinov2.hub.layouts_dinov3 import is_dinov3, rounding_of_periods
from dinov2.hub.pixels import Colours
from dinov2.hub.record import normalisation, trained_with
from dinov2.hub.save import write_new
from dinov2.hub.teacher import description, load_teacher
from dinov2.utils import cli
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.provenance import how_to_install

logger = logging.getLogger("dinov2")


def export(args: argparse.Namespace, results: str = "") -> int:
    """Do what the command's arguments say; returns the exit status.

    ``args.checkpoint`` is one file, see `dinov2.hub.locate.teacher_file`; ``results`` a table of what was measured of
    this teacher. Raises ValueError, OSError and ImportError with a sentence each.
    """
    layout: Layout = EXPORTS[args.format]()
    _check_options(layout, args)
    tiles = None if args.verify is None else verify.read_tiles(args.verify or None)
    record = description(args.checkpoint)
    colours, asked, told = _colours(args)
    if asked:  # of weights that came without: whoever opens the export has to know
        config = record.get("config") or {}
        record["config"] = {**config, "augmentation": {**config.get("augmentation", {}), **asked}}
    model = load_teacher(args.checkpoint)
    if args.image_size is not None:
        fit_to_images(model, args.image_size)
    # Another backbone has a file and a JSON of its own names, which no library opens.
    is_known = is_vit(model) or is_dinov3(model)
    arguments = arguments_of(model) if is_known or args.verify is not None else {}
    with tempfile.TemporaryDirectory(prefix="pathfm_export_") as scratch:
        files = layout.files(model, DTYPES[args.dtype], colours, record, Path(scratch))
        side = arguments.get("img_size")
        known = description(args.checkpoint)
        card = model_card(layout, model, args.dtype, side, told, known, results, args.license, args.push or "")
        _write(args.output, files, card)
    if is_dinov3(model) and (rounding := rounding_of_periods(model)) > 1e-6:
        logger.warning(
            "The teacher's periods of rotary positions are rounded by up to %.1g of each, as in Meta's files; timm's "
            "and transformers' are exact, and outputs will differ a little.", rounding,
        )  # fmt: skip
    if is_vit(model):
        _warn_of_resampling(layout, arguments)
    if tiles is not None:
        check = _Check(layout, model, arguments, colours, tiles)
        del model  # one at a time: the largest takes 9 GB
        if not check.holds(args.output, args.dtype):
            return cli.FAILURES
    if args.push:
        how = {"private": args.private, "revision": args.revision, "replace": args.replace}
        address = push(args.output, [*files, CARD], args.push, **how)
        sys.stdout.write(f"pushed to {address}\n")
    return cli.DONE


def _check_options(layout: Layout, args: argparse.Namespace) -> None:
    if args.dtype not in layout.dtypes:
        raise ValueError(f"--dtype is {args.dtype}; --format {args.format} has {' and '.join(layout.dtypes)}.")
    if not args.push and (args.private or args.revision or args.replace):
        raise ValueError("--private, --revision and --replace say how to --push; add that, or leave them out.")
    needed = {f"--format {args.format}": layout.writers}
    if args.verify is not None:
        needed[f"--verify of --format {args.format}"] = (layout.library,)
    for what, packages in needed.items():
        if missing := [name for name in packages if find_spec(name) is None]:
            advice = how_to_install(layout.extra)
            raise ImportError(f"{what} needs {' and '.join(missing)}, which is not installed; {advice}.")


def _colours(args: argparse.Namespace) -> tuple[Colours, dict[str, Any], str]:
    """What images are normalised with; that of it which the command line alone tells, as keys of a configuration; and
    where it is from, in words.

    Raises ValueError where it tells otherwise than what the teacher was trained with.
    """
    trained, asked = trained_with(args.checkpoint), {}
    mean, std, told = normalisation(args.checkpoint, args.mean, args.std)
    for name, value in (("mean", args.mean), ("std", args.std)):
        if value is None:
            continue
        if trained.get(name, value) != value:
            raise ValueError(
                f"--{name} is {value}, but this teacher was trained with {trained[name]}, which its export has to "
                f"state; leave --{name} out."
            )
        asked[f"normalize_{name}"] = value
    return Colours(mean, std), asked, told


def _write(output: Path, files: dict[str, Any], card: str) -> None:
    """Write what is not there yet; a card that is there is its owner's, who will have gone over it."""
    path = output / CARD
    is_kept = path.is_file()
    done = "wrote" if write_new(output, files if is_kept else {**files, CARD: card}) else "already there:"
    sys.stdout.write(f"{done} {', '.join(sorted([*files, CARD]))} in {output}\n")
    if is_kept and path.read_text(errors="replace") != card:
        logger.info("'%s' stays as it is; it is not what would be written now.", path)


def _warn_of_resampling(layout: Layout, teacher: dict[str, Any]) -> None:
    """Say where readers resample positions otherwise than the teacher does."""
    own = (teacher["interpolate_antialias"], teacher["interpolate_offset"])
    theirs = layout.resampling(teacher["num_register_tokens"])
    if theirs not in (None, own):
        logger.warning(
            "For images of other than %d px %s resamples positions with antialias=%s, offset=%s, this teacher with "
            "antialias=%s, offset=%s: outputs will differ there; export with --image-size for the size in use.",
            teacher["img_size"], layout.reader, *theirs, *own,
        )  # fmt: skip


class _Check:
    """What the export has to compute: the teacher's tokens of some tiles, at one or two sizes of images."""

    def __init__(
        self, layout: Layout, model: nn.Module, teacher: dict[str, Any], colours: Colours, tiles: list[Any]
    ) -> None:
        side, patch = teacher["img_size"], teacher["patch_size"]
        self._layout, self._colours, self._tiles = layout, colours, tiles
        self._open = layout.opener(model, colours)
        sides = [side]
        # One patch less: the position grid is resampled.
        if layout.any_size and side > patch and (not is_vit(model) or _resamples_alike(layout, teacher)):
            sides.append(side - patch)
        self._expected = {side: verify.tokens(model, tiles, side, colours) for side in sides}

    def holds(self, folder: Path, dtype: str) -> bool:
        """Whether the library computes the same with the files; says how nearly."""
        theirs, holds = self._open(folder), True
        library, tolerances = self._layout.library, self._layout.tolerances[dtype]
        for side, ours in self._expected.items():
            found = verify.Agreement(ours, verify.tokens(theirs, self._tiles, side, self._colours))
            sys.stdout.write(f"{library}, {len(self._tiles)} tiles of {side} px: {found}\n")
            holds &= found.holds(*tolerances)
        if not holds:
            logger.error(
                "%s disagrees: a difference of at most %g of the largest output and a cosine of at least %g are "
                "expected of %s.", library, *tolerances, dtype,
            )  # fmt: skip
        return holds


def _resamples_alike(layout: Layout, teacher: dict[str, Any]) -> bool:
    own = (teacher["interpolate_antialias"], teacher["interpolate_offset"])
    return own == layout.verified_resampling(teacher["num_register_tokens"])
