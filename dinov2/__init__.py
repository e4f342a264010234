"""Path-FM: DINOv2 self-distillation on histology tiles."""

import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and find_spec("torch") is None:  # a command, of which a traceback would say less
    _python = Path(__file__).parents[1] / ".venv/bin/python"
    sys.stderr.write(f"{sys.executable} has no PyTorch: use {_python}, which ./install.sh makes.\n")
    sys.exit(2)
