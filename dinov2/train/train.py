"""Train a model: ``python dinov2/train/train.py --config-file F --output-dir D [section.key=value ...]``.

Started alone it trains in one process; under ``torchrun`` or ``srun`` it shards over all of them. What is wrong with
the command line or the configuration is said here, before torch is imported, which takes seconds.
"""

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from dinov2.configs import Config, load_config, recipes, validate
except ModuleNotFoundError as error:
    python = Path(__file__).parents[2] / ".venv/bin/python"
    sys.stderr.write(f"{sys.executable} has no {error.name}: use {python}, which ./install.sh makes.\n")
    sys.exit(2)
from dinov2.logging import setup_logging
from dinov2.train.plan.gpus import named_gpu
from dinov2.utils.cli import at_least, command_parser, local_folder, run_as_process, run_command
from dinov2.utils.launch import join_launch
from dinov2.utils.signals import receive_when_parent_dies

logger = logging.getLogger("dinov2")

_DATA = (
    "data.path", "data.datasets", "train.datasets", "train.streaming_dataset_path", "train.sample_list_path",
    "online.slides",
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser(
        "python dinov2/train/train.py",
        "DINOv2 self-distillation on pathology tiles.",
        "--config-file vits14_reg4 --output-dir output_vits14 data.path=/data/tiles --dry-run",
        "--config-file vits14_reg4 data.path=/data/tiles --dry-run --gpu 'RTX 4090' --price 0.5 --pictures plan",
        "--config-file vits14_reg4 --output-dir output_vits14 data.path=/data/tiles train.batch_size_per_gpu=128",
    )
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="YAML file, merged over the defaults, or recipe: " + ", ".join(recipes()))
    add("--output-dir", "--output_dir", metavar="DIR", help="the run's folder; train.output_dir where left out")
    add("--no-resume", action="store_true", help="start anew; refused where the folder holds a run")
    add("--eval-only", action="store_true", help="export the newest checkpoint's teacher and stop")
    add("--eval", metavar="TYPE", help=argparse.SUPPRESS)  # of Meta's command, which reads it nowhere
    add("--dry-run", action="store_true", help="show the plan, check weights and data, and stop")
    plan = parser.add_argument_group("with --dry-run")
    for_plan = (
        plan.add_argument("--gpu", metavar="NAME", help="plan for this GPU, such as 'H100 NVL' or 'RTX 4090'"),
        plan.add_argument(
            "--memory", metavar="GIB", type=at_least(1, float),
            help="of each GPU, as PyTorch sees it; for GPUs that are unknown, sold in two sizes or in use",
        ),
        plan.add_argument("--price", type=at_least(0, float), help="of an hour of one GPU, for the cost"),
        plan.add_argument(
            "--pictures", metavar="DIR", type=local_folder,
            help="write schedules.png and crops.png, augmented tiles with their masks, to this folder",
        ),
    )  # fmt: skip
    add("overrides", nargs="*", metavar="section.key=value", help="override configuration values")
    args = parser.parse_intermixed_args(argv)  # overrides may stand before, between and after flags
    args.overrides = joined(args.overrides)
    given = [action.option_strings[0] for action in for_plan if getattr(args, action.dest) is not None]
    if given and not args.dry_run:
        parser.error(f"{', '.join(given)} can only be given with --dry-run")
    if args.output_dir:
        args.output_dir = os.path.expanduser(args.output_dir)
    return args


def joined(words: Sequence[str]) -> list[str]:
    """Overrides of which some were written with blanks around the equals sign, so that a shell took them apart."""
    overrides: list[str] = []
    for word in words:
        before = overrides[-1] if overrides else ""
        ends_open = before.endswith("=") and "=" not in word  # `key=` alone is an empty value
        if before and (ends_open or (word.startswith("=") and "=" not in before)):
            overrides[-1] += word
        else:
            overrides.append(word)
    return overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, see `run_command`."""
    args = parse_args(argv)
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a crash in native code says where, however this process was started
    setup_logging()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        receive_when_parent_dies()  # or this rank would train on, alone
    return run_command(lambda: _run(args), logger, resumable=not args.dry_run)


def _run(args: argparse.Namespace) -> int:
    if args.eval:
        logger.warning(
            "--eval %s has no effect: --eval-only exports the teacher, and python -m dinov2.eval.probe judges it.",
            args.eval,
        )
    join_launch()
    # Of several processes, rank 0 speaks for all once they have found each other.
    if args.eval_only and args.overrides:
        logger.warning("--eval-only exports a run as it was trained; %s has no effect.", " ".join(args.overrides))
    needs_none = args.eval_only and args.output_dir and not args.dry_run
    config = None if "RANK" in os.environ or needs_none else _read_config(args)
    if config:
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    if args.gpu is not None or args.memory is not None:
        args.gpu = named_gpu(args.gpu or "", args.memory)
    if sys.stderr.isatty():
        logger.info("Loading PyTorch ...")
    from dinov2.train.start import start

    return start(args, lambda: config or _read_config(args))


def _read_config(args: argparse.Namespace) -> Config:
    if args.config_file is None:
        if args.eval_only:
            raise ValueError("--eval-only exports a run; give --output-dir its folder.")
        named = {override.partition("=")[0].strip() for override in args.overrides}
        if "student.arch" not in named or named.isdisjoint(_DATA):
            raise ValueError(
                f"--config-file is missing; give a YAML file or a recipe: {', '.join(recipes())}. (Without one, "
                "student.arch and data.path have to be among the overrides.)"
            )
    return load_config(args.config_file, args.overrides)


if __name__ == "__main__":
    run_as_process(main)
