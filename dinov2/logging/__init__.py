"""Run logging: the package logger with rank prefix, metric accumulation and metric sinks."""

import logging
import sys
from pathlib import Path


class _LogFile(logging.FileHandler):
    """A log that, where its file cannot be written, says so once on stderr, instead of a traceback for each line."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(f"Log '{self.baseFilename}' cannot be written ({error.strerror}); lines are lost.\n")


def setup_logging(output_dir: Path | None = None) -> logging.Logger:
    """Configure the ``dinov2`` logger, anew at each call: stderr without debugging (warnings, on other ranks than 0),
    and ``logs/rank_R.log`` in the output folder, if one is given, to which is appended.
    """
    logger = logging.getLogger("dinov2")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    rank = _global_rank()
    where = f"[rank {rank}] " if rank else ""
    formatter = logging.Formatter(f"%(asctime)s %(levelname).1s {where}%(message)s", datefmt="%m-%d %H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING if rank else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if output_dir is not None:
        (output_dir / "logs").mkdir(exist_ok=True)
        handlers.append(_LogFile(output_dir / "logs" / f"rank_{rank}.log"))
    # Last: what is wrong with the file is said by those before.
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def _global_rank() -> int:
    if "torch" not in sys.modules:  # there is no process group, and whoever only says an error need not wait for it
        return 0
    from dinov2.distributed import get_global_rank

    return get_global_rank()
