"""How commands end, and the names of their options."""

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.utils import cli

LOGGER = logging.getLogger("test_cli")


def raising(error: BaseException) -> int:
    """A command that ends so."""
    raise error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lambda: None, 0),
        (lambda: cli.FAILURES, 1),
        (lambda: raising(ValueError("no such thing")), 2),
        (lambda: raising(FileNotFoundError("no such file")), 2),
        (lambda: raising(ImportError("no such package")), 2),
        (lambda: raising(KeyboardInterrupt()), 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    ],
)
def test_exit_statuses(body, status: int):
    assert cli.run_command(body, LOGGER) == status


def test_errors_are_told_in_their_own_words(caplog: pytest.LogCaptureFixture):
    cli.run_command(lambda: raising(ValueError("--rows is 0; 1 or more is accepted.")), LOGGER)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == [
        "--rows is 0; 1 or more is accepted."
    ]


def test_a_signal_that_comes_while_an_error_is_told_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LOGGER, "error", lambda *said: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.run_command(lambda: raising(ValueError("no such thing")), LOGGER) == 2


def test_faults_of_ours_are_not_taken_for_the_user_s():
    with pytest.raises(AttributeError):
        cli.run_command(lambda: raising(AttributeError("a bug")), LOGGER)


def test_further_errors_can_be_the_user_s():
    class Full(RuntimeError):
        """Of a command."""

    assert cli.run_command(lambda: raising(Full("full")), LOGGER, errors=(Full,)) == 2


def test_the_handler_of_sigterm_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    cli.run_command(lambda: None, LOGGER)
    assert signal.getsignal(signal.SIGTERM) == before


ENDING = """
import atexit, os, sys, threading, time
from dinov2.utils import cli

class Aborting:  # as a native library may, while the interpreter is taken apart
    abort = os.abort
    def __del__(self):
        self.abort()

def main():
    sys.modules["kept"] = Aborting()
    atexit.register(print, "an exit function", end="")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    {end}

{call}
"""


@pytest.mark.parametrize(
    ("call", "end", "status"),
    [
        ("cli.run_as_process(main)", "return 75", 75),
        ("cli.run_as_process(main)", "raise ZeroDivisionError", -signal.SIGABRT),
        ("sys.exit(main())", "return 75", -signal.SIGABRT),
    ],
)
def test_a_process_that_has_done_its_work_is_not_taken_apart(call: str, end: str, status: int):
    program = ENDING.format(call=call, end=end)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    if status == 75:
        assert ended.stdout == "a thread\nan exit function"


def test_older_spellings_of_options_stay_valid():
    parser = argparse.ArgumentParser()
    cli.add_options(parser, "--pooling", "--dtype", "--image-size", "--device", "--workers")
    old = parser.parse_args(["--output-tokens", "cls_mean", "--autocast", "bf16", "--size", "98", "--num-workers", "3"])
    new = parser.parse_args(["--pooling", "cls_mean", "--dtype", "bf16", "--image-size", "98", "--workers", "3"])
    assert old == new and vars(new) == {
        "pooling": "cls_mean", "dtype": "bf16", "image_size": 98, "device": None, "workers": 3,
    }  # fmt: skip


def test_the_first_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    report = tmp_path / "failures.jsonl"
    report.write_text('{"slide": "a b.svs", "reason": "cut short"}\n{"slide": "c.svs", "reason": "gone"}\n')
    told = cli.told_failures(2, 5, "slides", report)
    assert all(part in told for part in ("2 of 5 slides", "'a b.svs'", "cut short", str(report)))


def test_reasons_of_failures_are_on_the_console(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("tool")
    cli.log_failures(logger, {f"{number}.svs": f"reason {number}" for number in range(12)}, Path("failures.jsonl"))
    told = caplog.messages
    assert len(told) == 11
    assert all(f"{number}.svs" in told[number] and f"reason {number}" in told[number] for number in range(10))
    assert "2 more" in told[-1] and "failures.jsonl" in told[-1]
    caplog.clear()
    cli.log_failures(logger, {}, Path("failures.jsonl"))
    assert not caplog.messages


def test_a_parser_says_how_its_command_was_started():
    def helped() -> str:
        return cli.command_parser("python tool.py", "Does it.", "a --b", epilog="Exit status.").format_help()

    assert helped().rstrip().splitlines()[-1] == "  python tool.py a --b"
    with cli.started_as("pathfm tool"):
        assert helped().rstrip().splitlines()[-1] == "  pathfm tool a --b"
    assert helped().startswith("usage: python tool.py")


@pytest.mark.parametrize("word", ["--outputdir", "--output-dri=x"])
def test_a_misspelt_option_is_one_line_with_the_nearest(word: str, capsys: pytest.CaptureFixture):
    parser = cli.command_parser("python tool.py", "A tool.")
    for names in (("--output-dir", "--output_dir"), ("--workers",)):
        parser.add_argument(*names)
    with pytest.raises(SystemExit) as end:
        parser.parse_args([word])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "--output-dir?" in line


def test_an_error_of_the_system_names_the_file_without_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "absent/file"
    assert cli.run_command(path.read_text, LOGGER) == 2
    assert str(path) in caplog.text and "Errno" not in caplog.text
