"""The folder of a run: writable, free of what is not a run's, and used by one launch at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dinov2.distributed import on_main_process
from dinov2.fsdp import Checkpointer
from dinov2.utils.files import locked

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
        OSError: if the folder cannot be made or written, or another launch is using it.
        ValueError: if a new run would start in the folder of an existing one, or a name that a run needs is taken.
    """
    busy = (
        f"Output folder {str(output_dir)!r} is in use by another launch; wait for that to end, or give --output-dir "
        "another folder."
    )
    with contextlib.ExitStack() as held:

        def take() -> None:
            _prepare(output_dir, resume)
            held.enter_context(locked(output_dir / _LOCK, busy=busy))

        on_main_process(take)
        yield


def _prepare(output_dir: Path, resume: bool) -> None:
    """Make and check the folder."""
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


def require_checkpoint(output_dir: Path) -> None:
    """Make sure that there is a checkpoint to export.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not Checkpointer(output_dir, keep=1).steps():
        raise FileNotFoundError(
            f"Output folder {str(output_dir)!r} holds no complete checkpoint to export; give --output-dir the folder "
            "of a run that has saved one."
        )
