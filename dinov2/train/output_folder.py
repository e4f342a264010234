"""The folder of a run: writable, free of what is not a run's, and used by one launch at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dinov2.distributed import on_main_process
from dinov2.utils.files import locked

_FOLDERS = ("checkpoints", "eval", "logs")
_FILES = ("config.yaml", "metrics.jsonl", "last_checkpoint", "stream_index")


@contextlib.contextmanager
def hold_output_dir(output_dir: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder, check it and keep other launches out of it; all ranks must enter.

    Raises OSError if the folder cannot be made or written, or another launch is using it; ValueError if it holds a run
    and ``resume`` is false, or something else under a name that a run needs.
    """
    shown = f"Output folder {str(output_dir)!r}"
    busy = f"{shown} is in use by another launch; wait for that to end, or give --output-dir another folder."

    def prepare() -> None:
        probe = output_dir / f".write_probe_{os.getpid()}"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"{shown} cannot be written ({error.strerror}); give --output-dir a folder that can."
            ) from error
        there = {name: output_dir / name for name in (*_FOLDERS, *_FILES) if (output_dir / name).exists()}
        taken = [name for name, path in there.items() if not (path.is_dir() if name in _FOLDERS else path.is_file())]
        if taken:
            raise ValueError(
                f"{shown} holds something else under {', '.join(taken)}, which a run writes itself "
                f"({', '.join(_FOLDERS)} are folders, {', '.join(_FILES)} files); give another folder."
            )
        if not resume and there.keys() & {"metrics.jsonl", "checkpoints"}:
            raise ValueError(
                f"{shown} holds a run already; leave out --no-resume to go on with it, or give a new folder."
            )
        held.enter_context(locked(output_dir / ".lock", busy=busy))

    with contextlib.ExitStack() as held:
        on_main_process(prepare)
        yield
