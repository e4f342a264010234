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


_ROOT = Path(__file__).resolve().parents[1]
_script = Path(sys.argv[0]).resolve() if sys.argv and sys.argv[0].endswith(".py") else Path()
# A command, whose imports take seconds, and of which a traceback would say less.
if sys.argv[:1] == ["-m"] or (_script.is_relative_to(_ROOT) and not _script.is_relative_to(_ROOT / ".venv")):
    sys.excepthook = _say_interrupted
if sys.argv[:1] == ["-m"] and find_spec("torch") is None:
    sys.stderr.write(f"{sys.executable} has no PyTorch: use {_ROOT}/.venv/bin/python, which ./install.sh makes.\n")
    sys.exit(2)
