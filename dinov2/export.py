"""Write a teacher for other libraries: ``python -m dinov2.export --checkpoint T --format hf --output DIR``.

`save_teacher` writes the file that training exports, which this and `dinov2.hub.load_teacher` open. Help and mistaken
command lines are answered before torch is imported, which takes seconds.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.extensions import EXPORTS
from dinov2.logging import setup_logging
from dinov2.utils import cli

__all__ = ["main", "save_teacher"]  # noqa: F822

logger = logging.getLogger("dinov2")


def __getattr__(name: str) -> Any:
    if name == "save_teacher":
        from dinov2.hub.save import save_teacher

        return save_teacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = cli.command_parser(
        "python -m dinov2.export",
        "Write a teacher's backbone for Meta's code and eva (meta), timm, transformers (hf) or ONNX Runtime (onnx).",
        "--checkpoint output --format hf --output teacher_hf --verify",
        "--checkpoint output --format timm --output teacher_timm --verify --license cc-by-4.0 --push ORG/NAME",
        epilog="Exit status: 0 written, 1 written but --verify found a difference, 2 not written, with the reason.",
    )
    cli.add_options(parser, "--checkpoint")
    parser.add_argument("--format", required=True, choices=tuple(EXPORTS), help="whose names and files")
    parser.add_argument("--output", required=True, type=Path, help="a new or empty folder")
    cli.add_options(parser, "--dtype", default="fp32", help="of all weights (%(default)s)")
    about = "resample the position grid to square images of this side (default: as in the file)"
    cli.add_options(parser, "--image-size", help=about)
    cli.add_options(parser, "--mean", "--std")
    about = "open the export with its library and compare all tokens on images of this folder, or on scikit-image's"
    parser.add_argument("--verify", nargs="?", const="", metavar="TILES", help=f"{about} micrograph")
    parser.add_argument("--license", default="", metavar="ID", help="licence in the model card, by the hub's name")
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument("--push", type=_repo, metavar="ORG/NAME", help="upload the files, once verified")
    hub.add_argument("--private", action="store_true", help="make it a private repository")
    hub.add_argument("--revision", default="", metavar="BRANCH", help="to push to (default: main)")
    hub.add_argument("--replace", action="store_true", help="replace files there that differ")
    args = parser.parse_args(argv)
    setup_logging()
    return cli.run_command(lambda: _export(args), logger)


def _repo(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"it is '{text}', but it must be a repository's ORG/NAME")
    return text


def _export(args: argparse.Namespace) -> int:
    from dinov2.eval.probe.results import as_table, read_csv
    from dinov2.hub.export.command import export
    from dinov2.hub.locate import teacher_file
    from dinov2.hub.record import trained_with

    args.checkpoint = teacher_file(args.checkpoint)
    # Of a run's teacher, RUN/eval/training_N/teacher_checkpoint.pth, what the run measured of it.
    folder = Path(args.checkpoint).absolute().parent
    probes = folder.parent / "probes.csv"
    is_of_run = folder.name.startswith("training_") and probes.is_file()
    results = read_csv(probes, trained_with(args.checkpoint).get("step")) if is_of_run else []
    return export(args, as_table(results) if results else "")


if __name__ == "__main__":
    sys.exit(main())
