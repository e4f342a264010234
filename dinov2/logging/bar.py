"""A progress bar below the lines of the console, on a terminal alone."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dinov2.logging.metrics import is_of_training
from dinov2.logging.sinks import Sink

logger = logging.getLogger("dinov2")


class ProgressBar(Sink):
    """Steps done of the run's, moved on by each record; log lines pass above it. Nothing where there is no terminal."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO = sys.stderr):
        # The length of a step follows from records, which come seldom: tqdm's own estimate would jump.
        shown = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps"
        self._bar = tqdm(
            total=total_steps, initial=first_step, file=stream, disable=None, leave=False, dynamic_ncols=True,
            mininterval=0, miniters=1, bar_format=shown,
        )  # fmt: skip
        self._redirected = ExitStack()
        if not self._bar.disable:
            levels = [handler.level for handler in logger.handlers if getattr(handler, "stream", None) is stream]
            before = set(logger.handlers)
            self._redirected.enter_context(logging_redirect_tqdm([logger]))
            for handler in set(logger.handlers) - before:  # tqdm's, which lets everything through
                handler.setLevel(max(levels, default=logging.INFO))

    def write(self, record: Mapping[str, Any]) -> None:
        """Move the bar to the record's step."""
        if is_of_training(record):
            self._bar.update(record["step"] - self._bar.n)

    def close(self) -> None:
        """Take the bar away and give the console its lines back."""
        self._bar.close()
        self._redirected.close()
