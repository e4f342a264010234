"""Train a model: ``python dinov2/train/train.py --config-file F --output-dir D [section.key=value ...]``.

Started alone it trains in one process; under ``torchrun`` or ``srun`` it shards over all of them.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from dinov2.configs import load_config
from dinov2.distributed import MainProcessError, destroy_process_group, init_process_group, on_main_process, peer_lost
from dinov2.fsdp import Checkpointer
from dinov2.logging import setup_logging
from dinov2.train.output_folder import hold_output_dir
from dinov2.train.run import CollapseError, Run, dry_run
from dinov2.train.state import TrainState
from dinov2.train.update.guard import NonFiniteError
from dinov2.train.watchdog import Watchdog
from dinov2.utils.cli import run_command
from dinov2.utils.environment import DeviceError, memory_advice, select_device
from dinov2.utils.launch import join_launch
from dinov2.utils.signals import receive_sigterm_when_parent_dies

logger = logging.getLogger("dinov2")

_UNTIL_WATCHED = timedelta(days=1)  # that a collective may take: the watchdog, which is told by the run, is faster
_SMALLER = "lower train.batch_size_per_gpu, the crops or the heads, or use more GPUs"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="DINOv2 self-distillation on pathology tiles.")
    parser.add_argument("--config-file", help="YAML file, merged over ssl_default_config.yaml")
    parser.add_argument("--output-dir", "--output_dir", help="the run's folder; train.output_dir where left out")
    parser.add_argument("--no-resume", action="store_true", help="start anew; refused where the folder holds a run")
    parser.add_argument("--eval-only", action="store_true", help="export the newest checkpoint's teacher and stop")
    parser.add_argument("--eval", metavar="TYPE", help=argparse.SUPPRESS)  # of Meta's command, which reads it nowhere
    parser.add_argument("--dry-run", action="store_true", help="check configuration and data, show the plan and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override configuration values")
    return parser.parse_intermixed_args(argv)  # overrides may stand before, between and after flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, see `run_command`."""
    args = parse_args(argv)
    setup_logging()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        receive_sigterm_when_parent_dies()  # or this rank would train on, alone
    try:
        errors = (DeviceError, NonFiniteError, CollapseError)
        return run_command(lambda: _run(args), logger, errors=errors, resumable=not args.dry_run)
    finally:
        destroy_process_group()  # may wait for the other ranks: after the error has been said


def _run(args: argparse.Namespace) -> None:
    if args.eval:
        logger.warning(
            "--eval %s has no effect: --eval-only exports the teacher, and python -m dinov2.eval.probe judges it.",
            args.eval,
        )
    join_launch()
    if args.dry_run:
        config = load_config(args.config_file, args.overrides)
        sys.stdout.write(dry_run(config, int(os.environ.get("WORLD_SIZE", "1"))) + "\n")
        return
    device = select_device()
    init_process_group(device, _UNTIL_WATCHED)
    try:
        config = on_main_process(lambda: load_config(args.config_file, args.overrides))
        output_dir = Path(args.output_dir or config.train.output_dir)
        if args.eval_only and not Checkpointer(output_dir, keep=1).steps():
            raise FileNotFoundError(
                f"Output folder {str(output_dir)!r} holds no complete checkpoint to export; give --output-dir the "
                "folder of a run that has saved one."
            )
        with hold_output_dir(output_dir, resume=not args.no_resume), memory_advice(_SMALLER), peer_lost():
            setup_logging(output_dir)
            limits = config.train.hang_timeout, config.train.start_timeout, 60 * config.data.outage_minutes
            with Watchdog(output_dir, TrainState(), *limits) as watchdog:
                with watchdog.phase("starting", with_others=True, is_long=True):
                    run = Run(config, output_dir, device, watchdog, args.eval_only)
                if args.eval_only:
                    run.export_teacher(run.state)
                else:
                    run.train()
    except MainProcessError:
        time.sleep(1)  # torchrun ends all processes as soon as one has left, and rank 0 has something to say
        raise


if __name__ == "__main__":
    sys.exit(main())
