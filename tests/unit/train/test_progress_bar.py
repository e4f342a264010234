"""The progress bar on a terminal, and that there is none elsewhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.logging import setup_logging
from dinov2.logging.bar import ProgressBar

RECORD = {"total_steps": 40, "total_loss": 1.0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    setup_logging()


def test_lines_pass_above_the_bar_which_goes_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    logger = setup_logging(tmp_path)
    handlers = list(logger.handlers)
    bar = ProgressBar(40, 4, terminal)
    logger.info("a line")
    logger.debug("for the file alone")
    for step in (10, 20):
        bar.write(RECORD | {"step": step})
    bar.write({"step": 20, "task/knn/balanced_accuracy": 0.5})  # of a probe, which is no progress
    bar.close()
    shown = terminal.getvalue()
    assert "4/40" in shown and "20/40" in shown
    assert "a line\n" in shown and "alone" not in shown
    assert shown.rsplit("\r", 1)[-1].strip() == ""  # nothing of the bar is left on the line
    assert list(logger.handlers) == handlers
    assert "for the file alone" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_pipes_and_files_get_no_bar():
    pipe, before = io.StringIO(), list(logging.getLogger("dinov2").handlers)
    bar = ProgressBar(40, 0, pipe)
    bar.write(RECORD | {"step": 10})
    assert list(logging.getLogger("dinov2").handlers) == before
    bar.close()
    assert pipe.getvalue() == ""
