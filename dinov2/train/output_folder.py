"""The folder of a run: writable, free of what is not a run's, and used by one launch at a time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from dinov2.distributed import on_main_process
from dinov2.fsdp import Checkpointer

logger = logging.getLogger("dinov2")

_FOLDERS = ("checkpoints", "eval", "logs")
_FILES = ("config.yaml", "metrics.jsonl", "last_checkpoint", "stream_index")
_LOCK = ".lock"


@contextlib.contextmanager
def hold_output_dir(output_dir: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder, check it and keep other launches out of it; all ranks must enter.

    Args:
        output_dir: the folder.
        resume: whether it may hold a run.

    Raises:
        OSError: the folder cannot be made or written, or another launch is using it.
        ValueError: a new run would start in the folder of an existing one, or a name that a run needs is taken.
    """
    held: list[int] = []
    on_main_process(lambda: held.append(_prepare(output_dir, resume)))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _prepare(output_dir: Path, resume: bool) -> int:
    """Make, check and lock the folder; returns the file descriptor that holds the lock."""
    probe = output_dir / f".write_probe_{os.getpid()}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"Output folder {str(output_dir)!r} cannot be written ({error.strerror}); give --output-dir a folder "
            "that can."
        ) from error
    taken = [name for name in _FOLDERS if (output_dir / name).exists() and not (output_dir / name).is_dir()]
    taken += [name for name in _FILES if (output_dir / name).exists() and not (output_dir / name).is_file()]
    if taken:
        raise ValueError(
            f"Output folder {str(output_dir)!r} holds something else under {', '.join(taken)}, which a run writes "
            f"itself ({', '.join(_FOLDERS)} are folders, {', '.join(_FILES)} files); give another folder."
        )
    if not resume and any((output_dir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise ValueError(
            f"Output folder {str(output_dir)!r} holds a run already; leave out --no-resume to go on with it, or "
            "give a new folder."
        )
    return _lock(output_dir)


def _lock(output_dir: Path) -> int:
    # A lock of this kind is not inherited by workers and is gone with the process, however that ends.
    descriptor = os.open(output_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise OSError(
            f"Output folder {str(output_dir)!r} is in use by another launch; wait for that to end, or give "
            "--output-dir another folder."
        ) from error
    except OSError as error:
        logger.warning("No lock can be had in %s (%s); start only one run there.", output_dir, error.strerror)
    return descriptor


def require_checkpoint(output_dir: Path) -> None:
    """Make sure that there is a checkpoint to export.

    Raises:
        FileNotFoundError: there is none.
    """
    if not Checkpointer(output_dir, keep=1).steps():
        raise FileNotFoundError(
            f"Output folder {str(output_dir)!r} holds no complete checkpoint to export; give --output-dir the folder "
            "of a run that has saved one."
        )
