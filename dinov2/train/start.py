"""A run from its start to its end: device, processes, folder, watchdog. Imports torch; `train.py` answers before."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from dinov2.configs import Config
from dinov2.distributed import MainProcessError, destroy_process_group, init_process_group, on_main_process, peer_lost
from dinov2.fsdp import Checkpointer
from dinov2.logging import setup_logging
from dinov2.train.dry_run import dry_run
from dinov2.train.output_folder import hold_output_dir
from dinov2.train.run import CollapseError, Run
from dinov2.train.state import TrainState
from dinov2.train.update.guard import NonFiniteError
from dinov2.train.watchdog import Watchdog
from dinov2.utils.cli import run_command
from dinov2.utils.environment import memory_advice, select_device
from dinov2.utils.secrets import public_text

logger = logging.getLogger("dinov2")

_UNTIL_WATCHED = timedelta(days=1)  # that a collective may take: the watchdog, which is told by the run, is faster
_SMALLER = "lower train.batch_size_per_gpu, the crops or the heads, or use more GPUs"


def start(args: argparse.Namespace, read_config: Callable[[], Config]) -> int:
    """Run the command of `train.py`, whose arguments these are; returns its exit status, see `run_command`.

    Rank 0 alone reads the configuration, once the processes have found each other, and says what is wrong with it.
    """
    try:
        errors = (NonFiniteError, CollapseError)
        return run_command(lambda: _run(args, read_config), logger, errors=errors, resumable=not args.dry_run)
    finally:
        destroy_process_group()  # may wait for the other ranks: after the error has been said


def _run(args: argparse.Namespace, read_config: Callable[[], Config]) -> None:
    if args.dry_run:
        config = read_config()
        dry_run(
            config,
            int(os.environ.get("WORLD_SIZE", "1")),
            _show,
            gpu=args.gpu,
            price=args.price,
            pictures=args.pictures,
            output_dir=_output_dir(args, config),
        )
        return
    device = select_device()
    init_process_group(device, _UNTIL_WATCHED)
    try:
        # The run that is exported has its configuration in its checkpoint.
        config = Config() if args.eval_only and args.output_dir else on_main_process(read_config)
        output_dir = _output_dir(args, config)
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
                    run = Run(config, output_dir, device, args.eval_only, watchdog)
                # Around the phases of a step: all that comes before the first, between two and after the last.
                with watchdog.phase("about to train or to end", with_others=True, is_long=True):
                    if args.eval_only:
                        run.export_teacher(run.state)
                        run.write_card(run.state)
                    else:
                        run.train()
    except MainProcessError:
        time.sleep(1)  # torchrun ends all processes as soon as one has left, and rank 0 has something to say
        raise


def _output_dir(args: argparse.Namespace, config: Config) -> Path:
    given = args.output_dir or config.train.output_dir
    if "://" in given:  # which would be taken for a folder of that name
        raise ValueError(f"Output folder {given!r} is a URL; give --output-dir a folder on this machine.")
    return Path(given)


def _show(text: str) -> None:
    sys.stdout.write(public_text(text) + "\n")
    sys.stdout.flush()  # what follows may take minutes, or fail
