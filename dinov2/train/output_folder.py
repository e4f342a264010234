"""The folder of a run: writable, free of what is not a run's, used by one launch at a time, each of which is noted."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dinov2.distributed import on_main_process
from dinov2.fsdp import Checkpointer
from dinov2.logging.sinks import JsonlSink
from dinov2.utils.files import leftovers, locked
from dinov2.utils.provenance import code_version

ATTEMPTS = "attempts.jsonl"

_FOLDERS = ("checkpoints", "eval", "logs")
_FILES = ("config.yaml", "metrics.jsonl", ATTEMPTS, "last_checkpoint", "stream_index", "exports.xxh128", ".lock")
_PROBE = ".write_probe_"
# What a run writes beside and renames, by the folder that it is in.
_WRITTEN = (
    (
        re.compile(r""),
        re.compile(r"config\.yaml|last_checkpoint|exports\.xxh128|stream_index(\.\d+)?|(wandb|mlflow)_run_id\.txt"),
    ),
    (re.compile(r"eval/training_\d+"), re.compile(r"teacher_checkpoint\.(pth|json)|README\.md")),
)


@contextlib.contextmanager
def hold_output_dir(output_dir: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder, check it and keep other launches out of it; all ranks must enter.

    What killed launches have left unfinished is deleted.

    Raises OSError if the folder cannot be made or written, or another launch is using it; ValueError if it holds a run
    and ``resume`` is false, or something else under a name that a run needs.
    """
    shown = f"Output folder {str(output_dir)!r}"
    busy = f"{shown} is in use by {{holder}}; wait for that to end, or give --output-dir another folder."
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"another launch (process {os.getpid()} on {socket.gethostname()}, since {started})"

    def prepare() -> None:
        probe = output_dir / f"{_PROBE}{os.getpid()}"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"{shown} cannot be written ({error.strerror}); give --output-dir a folder that can."
            ) from error
        there = {name: output_dir / name for name in (*_FOLDERS, *_FILES) if os.path.lexists(output_dir / name)}
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
        held.enter_context(locked(output_dir / ".lock", busy=busy, holder=holder))
        _sweep(output_dir)

    with contextlib.ExitStack() as held:
        on_main_process(prepare)
        yield


def note_attempt(output_dir: Path, step: int, processes: int, device: str) -> int:
    """Add a line on this launch, which goes on after ``step``, to ``attempts.jsonl``; return its number, from 1 on."""
    path = output_dir / ATTEMPTS
    before = 0
    with contextlib.suppress(FileNotFoundError):
        before = path.read_bytes().count(b"\n")
    about = {"attempt": before + 1, "time": round(time.time(), 3), "step": step, "host": socket.gethostname()}
    about |= {"processes": processes, "device": device, "commit": code_version()}
    JsonlSink(path).write(about)
    return before + 1


def _sweep(output_dir: Path) -> None:
    """Delete unfinished files of earlier launches; of this one there are none yet, and no other is at work."""
    Checkpointer(output_dir, keep=1).sweep()
    for folder in (output_dir, *output_dir.glob("eval/*/")):
        name = str(folder.relative_to(output_dir)).removeprefix(".")
        for written, partial in leftovers(folder):
            if any(there.fullmatch(name) and what.fullmatch(written) for there, what in _WRITTEN):
                partial.unlink()
    for probe in output_dir.glob(f"{_PROBE}*"):
        if probe.name.removeprefix(_PROBE).isdigit():
            probe.unlink()
