"""Rename a run's folder, ``_move_aside.py FOLDER ASIDE``, unless a launch is using it; says in a sentence why not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dinov2.utils.files import locked


def main(folder: str, aside: str) -> str | None:
    """Rename, or return the sentence."""
    busy = f"OUTPUT_DIR={folder} is in use by {{holder}}: stop that first, or name another folder."
    try:
        with locked(Path(folder, ".lock"), busy=busy):
            Path(folder).rename(aside)
    except OSError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
