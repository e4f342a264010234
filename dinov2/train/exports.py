"""The list of teachers that a run has exported, and how many of them are kept."""

import contextlib
import logging
import re
from pathlib import Path

from dinov2.utils import files

logger = logging.getLogger("dinov2")

LISTING = "exports.xxh128"
"""File in the run's folder, as of ``xxhsum``: checksum and path of each teacher that the run exported and has kept."""

_LINE = re.compile(r"([0-9a-f]{32})  (eval/training_\d+/teacher_checkpoint\.pth)")


def export_path(output_dir: Path, step: int) -> Path:
    """File of the teacher exported after ``step`` steps."""
    return output_dir / "eval" / f"training_{step}" / "teacher_checkpoint.pth"


def list_export(output_dir: Path, step: int, checksum: str, keep: int) -> None:
    """Put an export on the list, and delete those before the ``keep`` last ones of it (0: none).

    What is not listed, or no longer what was listed, came from elsewhere and stays.
    """
    listing = output_dir / LISTING
    lines = listing.read_bytes().decode(errors="replace").splitlines() if listing.exists() else []
    listed = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    name = export_path(output_dir, step).relative_to(output_dir).as_posix()
    listed.pop(name, None)  # made again after a resume, it is the newest
    listed[name] = checksum
    for old in list(listed)[:-keep] if keep else ():
        _delete(output_dir / old, listed.pop(old))
    files.write_text(listing, (f"{value}  {name}\n" for name, value in listed.items()))


def _delete(path: Path, checksum: str) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            if files.checksum(path) != checksum:
                return
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    except OSError as error:  # no reason to end a run
        logger.warning("Teacher %s is no longer needed and cannot be deleted (%s).", path, error)
        return
    with contextlib.suppress(OSError):  # something else lies there, such as what was evaluated
        path.parent.rmdir()
