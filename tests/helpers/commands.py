"""Documented commands, run in this process, which has torch already."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
import warnings
from pathlib import Path
from unittest.mock import patch as replaced

import pytest

ROOT = Path(__file__).parents[2]


def run(command: str, line: str) -> int:
    """Exit status of a command started as ``python FILE`` or ``python -m MODULE`` with the arguments of ``line``.

    Arguments and environment of this process are afterwards what they were.
    """
    with replaced.dict(os.environ), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Of modules that another test has imported already.
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        patch.setattr(sys, "argv", [command, *shlex.split(line)])
        try:
            if command.endswith(".py"):
                runpy.run_path(str(ROOT / command), run_name="__main__")
            else:
                runpy.run_module(command, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
