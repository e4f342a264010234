"""Stock kaiko-eva on a teacher: ``python -m dinov2.eval.eva_cli predict_fit --config eval_configs/bach.yaml``.

Registers the backbone ``pathfm/teacher``, fills in what eva's configurations read from the environment and hands over
to eva's own command line, of whose subcommands and options all work. ``check`` in place of a subcommand only looks
whether the checkpoint and the device are usable.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.logging import setup_logging
from dinov2.utils.cli import DONE, INTERRUPTED, command_parser, run_command
from dinov2.utils.provenance import how_to_install

BACKBONE = "pathfm/teacher"
_CONFIGS = Path(__file__).parents[2] / "eval_configs"
_COMMANDS = ("fit", "predict", "predict_fit", "test", "validate")

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("dinov2")


def teacher(
    checkpoint_path: str, pooling: str | None = None, out_indices: int | None = None, output: str = "cls"
) -> nn.Module:
    """The backbone as eva's registry makes it. (No ``**kwargs``: eva passes on what the signature names.)

    Args:
        checkpoint_path, pooling, output: as of `dinov2.hub.load_teacher`.
        out_indices: 1 for what segmentation needs: a list with the un-normalised map (B, D, H/p, W/p) of the last
            block, whatever ``pooling`` says; another number is a ValueError.
    """
    from dinov2.hub import load_teacher

    if out_indices is None:
        return load_teacher(checkpoint_path, pooling=pooling or output)
    if int(out_indices) != 1:
        raise ValueError(f"OUT_INDICES is {out_indices}; a teacher gives the map of its last block, so 1 is expected.")
    return load_teacher(checkpoint_path, feature_map=True)


def fill_in(environment: MutableMapping[str, str]) -> None:
    """Set what the configurations read and the user left out.

    From ``CHECKPOINT_PATH`` and ``POOLING`` ("cls", "cls_mean"; ``EMBEDDING`` is an older name) follow MODEL_NAME,
    MODEL_EXTRA_KWARGS, IN_FEATURES (width of an embedding), MAP_FEATURES (width of a feature map), and NORMALIZE_MEAN
    and NORMALIZE_STD where the JSON beside the file states them. With another MODEL_NAME, or with MODEL_EXTRA_KWARGS
    set, nothing is filled in. A variable that is missing or has no meaning is a ValueError.
    """
    accelerator = environment.get("ACCELERATOR", "auto")
    if accelerator in ("gpu", "cuda"):
        import torch  # which takes seconds, and that mistakes need not wait for

        if not torch.cuda.is_available():
            raise ValueError(
                f"ACCELERATOR={accelerator} asks for a GPU and none is usable; leave it out or set it to cpu."
            )
    if environment.setdefault("MODEL_NAME", BACKBONE) != BACKBONE or "MODEL_EXTRA_KWARGS" in environment:
        return
    if not (path := environment.get("CHECKPOINT_PATH")):
        raise ValueError("CHECKPOINT_PATH is not set; name a teacher's file, or a run's folder.")
    from dinov2.hub import load_teacher, trained_with
    from dinov2.hub.locate import teacher_file
    from dinov2.hub.teacher import POOLINGS

    given = {name: environment[name] for name in ("POOLING", "EMBEDDING") if environment.get(name)}
    pooling = next(iter(given.values()), "cls")
    for name, value in given.items():
        if value not in POOLINGS or value != pooling:
            raise ValueError(f"{name}={value} is not {' or '.join(POOLINGS)}, or not the same as POOLING.")
    path = teacher_file(path)
    width = load_teacher(path).embed_dim
    path = str(Path(path).resolve()) if Path(path).exists() else path  # others are ids on the hub, or URLs
    environment.setdefault("MODEL_EXTRA_KWARGS", json.dumps({"checkpoint_path": path, "pooling": pooling}))
    environment.setdefault("IN_FEATURES", str(width * (2 if pooling == "cls_mean" else 1)))
    environment.setdefault("MAP_FEATURES", str(width))
    for key, value in trained_with(path).items():
        if key in ("mean", "std"):
            environment.setdefault(f"NORMALIZE_{key.upper()}", json.dumps(value))


def check_inputs(arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Look whether the configuration and the data are there before eva is loaded; the error says what is not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    for config in parser.parse_known_args(arguments)[0].config:
        if "://" not in config and not Path(config).is_file():
            known = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))
            raise FileNotFoundError(f"Configuration '{config}' does not exist; eval_configs/ has {known}.")
    if not (root := environment.get("DATA_ROOT")):
        raise ValueError("DATA_ROOT is not set; name the folder of the data set, see docs/evaluation.md.")
    if environment.get("DOWNLOAD_DATA", "").lower() != "true" and not Path(root).is_dir():
        raise FileNotFoundError(f"DATA_ROOT={root} is not a folder; docs/evaluation.md says what it should hold.")


def with_configurations(arguments: Sequence[str]) -> list[str]:
    """Arguments with the file of each of our configurations that is named, as ``--config bach``."""
    options = ["", *arguments][:-1]
    return [
        str(file) if option == "--config" and (file := _CONFIGS / f"{name}.yaml").is_file() else name
        for option, name in zip(options, arguments, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run eva; returns the exit status."""
    arguments = with_configurations(sys.argv[1:] if argv is None else argv)
    first = arguments[:1] if arguments[:1] != ["--version"] else []
    if first or not arguments:
        _parser().parse_args(first or ["--help"])  # what follows a subcommand is eva's
    setup_logging()

    def prepare() -> None:
        if first and not {"-h", "--help"} & set(arguments):
            if arguments != ["check"]:
                check_inputs(arguments, os.environ)
            fill_in(os.environ)
        _registered()

    if status := run_command(prepare, logger):
        return status
    if arguments == ["check"]:
        import torch

        logger.info("Evaluating on the %s.", "GPU" if torch.cuda.is_available() else "CPU: no GPU is usable")
        return DONE
    sys.argv = ["eva", *arguments]  # eva's callbacks read the configuration's name there, too
    try:
        _registered()()
    except KeyboardInterrupt:
        logger.error("Interrupted.")
        return INTERRUPTED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m dinov2.eval.eva_cli",
        "Stock kaiko-eva on a teacher: its own command line, whose subcommands and options all work.\n\n"
        "CHECKPOINT_PATH names the teacher or a run's folder, DATA_ROOT the data, POOLING cls or cls_mean;\n"
        "docs/evaluation.md has the others. scripts/run_eva.sh runs all benchmarks, one after another.",
        "predict_fit --config bach",
        "predict_fit --help",
        epilog="--config takes a file, or the name of one of ours: "
        + ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml"))),
    )
    about = "of eva, which says with --help what it takes; check: only look whether teacher and device are usable"
    parser.add_argument("subcommand", choices=(*_COMMANDS, "check"), help=about)
    return parser


def _registered() -> Callable[[], None]:
    """Eva's own entry point, once it knows the backbone."""
    try:
        from eva.__main__ import main as run
        from eva.vision.models.networks.backbones import backbone_registry
    except ImportError as error:
        raise ImportError(f"kaiko-eva cannot be imported ({error}); {how_to_install('eval')}.") from error
    if BACKBONE not in backbone_registry.entries():
        backbone_registry.register(BACKBONE)(teacher)
    return run


if __name__ == "__main__":  # eva starts processes with "spawn", which import this module again
    sys.exit(main())
