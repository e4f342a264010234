"""The launches of a run, noted in its folder."""

import socket
import time
from contextlib import suppress
from pathlib import Path

from dinov2.logging.sinks import JsonlSink
from dinov2.utils.provenance import code_version

ATTEMPTS = "attempts.jsonl"


def note_attempt(output_dir: Path, step: int, processes: int, device: str) -> int:
    """Add a line on this launch, which goes on after ``step``, to ``attempts.jsonl``; return its number, from 1 on."""
    path = output_dir / ATTEMPTS
    before = 0
    with suppress(FileNotFoundError):
        before = path.read_bytes().count(b"\n")
    about = {"attempt": before + 1, "time": round(time.time(), 3), "step": step, "host": socket.gethostname()}
    about |= {"processes": processes, "device": device, "commit": code_version()}
    JsonlSink(path).write(about)
    return before + 1
