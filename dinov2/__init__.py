"""Path-FM: DINOv2 self-distillation on histology tiles."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("Interrupted.\n")  # Python itself then ends as by the signal: status 130 in a shell
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # a command, whose imports take seconds, and of which a traceback would say less
    if find_spec("torch") is None:
        _python = Path(__file__).parents[1] / ".venv/bin/python"
        sys.stderr.write(f"{sys.executable} has no PyTorch: use {_python}, which ./install.sh makes.\n")
        sys.exit(2)
    sys.excepthook = _say_interrupted
