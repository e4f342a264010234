"""Common parts of all commands: exit statuses, how errors end a command, and one name for each option."""

import argparse
import atexit
import difflib
import json
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from dinov2.utils.secrets import hide_urls, keep_logs_public, public_text
from dinov2.utils.signals import STATUS_OF

# Exit statuses.
DONE = 0
FAILURES = 1  # done, but some items failed and are listed
USER_ERROR = 2  # one sentence has said what the user can mend
INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C: 130
TERMINATED = 128 + signal.SIGTERM  # 143; 129 after SIGHUP
RUN_AGAIN = STATUS_OF[signal.SIGUSR1]  # 75: stopped at a limit of time, of Slurm for instance
LOST = 76  # another process of the run was killed, or one hangs

_TOLD = 10  # failures whose reason is said on the console
_HELP_WIDTH = 100  # columns
_started: list[str] = []  # by which names commands were started, the last one counts


class Terminated(BaseException):
    """A signal asks to end; like `KeyboardInterrupt`, it unwinds the stack so that what is unfinished is removed."""

    def __init__(self, number: int):
        super().__init__()
        self.number = signal.Signals(number)


class Stopped(RuntimeError):
    """A command stopped early, as it was asked to, with all saved that it needs to go on; the text is a sentence."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class DeviceError(RuntimeError):
    """The machine has a GPU that this process cannot use, or not enough memory; the text is a sentence."""


class ToldElsewhere(RuntimeError):
    """An end whose reason another process of the same command says."""


def log_failures(logger: logging.Logger, reasons: Mapping[str, str], report: Path) -> None:
    """Say why the first of some items failed, by their names, and where the others are listed."""
    for name, reason in islice(reasons.items(), _TOLD):
        logger.warning("'%s' failed: %s", name, reason)
    if len(reasons) > _TOLD:
        logger.warning("%d more have failed; see %s.", len(reasons) - _TOLD, report)


def told_failures(failed: int, total: int, what: str, report: Path) -> str:
    """Say how many failed, why the first of a report of JSON lines with a `reason` did, and where the others are."""
    with report.open() as file:
        first = json.loads(file.readline())
    name = next(first[key] for key in ("slide", "slide_path", "file") if key in first)
    return f"{failed} of {total} {what} failed, such as '{name}': {first['reason']}; see {report}."


def run_command(
    body: Callable[[], int | None],
    logger: logging.Logger,
    *,
    errors: tuple[type[BaseException], ...] = (),
    resumable: bool = False,
) -> int:
    """Run a command's body and turn what ends it into a sentence and an exit status of those above.

    Args:
        body: returns an exit status, or None for 0.
        logger: where the sentence goes; the traceback goes there at level DEBUG.
        errors: exceptions, beside ValueError, OSError, ImportError and DeviceError, whose text is for the user.
        resumable: the same command goes on where it was stopped, which the last sentence says.
    """
    keep_logs_public()
    hide_urls(sys.argv)
    goes_on = "the same command goes on from here." if resumable else "nothing unfinished was kept."
    has_ended = False

    def terminate(number: int, frame: object) -> None:
        if not has_ended:  # else what ended it is being said
            raise Terminated(number)

    previous = {}
    with suppress(ValueError):  # not the main thread, which alone may set handlers
        for number in STATUS_OF.keys() - {signal.SIGINT}:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, terminate)
    try:
        try:
            return body() or DONE
        finally:
            has_ended = True
    except ToldElsewhere:
        return USER_ERROR
    except Stopped as error:
        logger.info("%s", error)
        return error.status
    except (ValueError, OSError, ImportError, DeviceError, *errors) as error:
        logger.error("%s", _sentence(error))
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR
    except KeyboardInterrupt:
        logger.error("Interrupted; %s", goes_on)
        return INTERRUPTED
    except Terminated as error:
        logger.error("Terminated by %s; %s", error.number.name, goes_on)
        return STATUS_OF[error.number]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Exit with the status of a command once exit functions have run, without the interpreter's own teardown.

    During that, threads of native libraries are still there, whose next step aborts a process that has done its work:
    seen of gloo's, which asks for the interpreter's lock to drop a tensor (pytorch/pytorch#190489).
    """
    ended: list[int] = []

    def leave() -> None:
        if ended:  # else an exception has been shown and is on its way
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended[0])

    atexit.register(leave)  # what is registered first is called last
    ended.append(main())
    sys.exit(ended[0])


def _sentence(error: BaseException) -> str:
    """What an error says; of the system's own the file and the reason, without its number."""
    if isinstance(error, OSError) and str(error).startswith("[Errno ") and error.filename is not None:
        return f"'{error.filename}' cannot be used: {error.strerror}."
    return str(error)


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with the option that may be meant, in place of a screenful of usage."""

    def error(self, message: str) -> NoReturn:
        """End the process with the status of a user's error; what is secret of what was given is not shown."""
        hide_urls(sys.argv)
        unknown = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        names = [action.option_strings[0] for action in self._actions if action.option_strings]
        near = [difflib.get_close_matches(word.partition("=")[0], names, n=1) for word in unknown]
        meant = ", ".join(name for found in near for name in found)
        hint = f" (did you mean {meant}?)" if meant else ""
        self.exit(USER_ERROR, f"{self.prog}: {public_text(message)}{hint}; {self.prog} --help says what it takes.\n")


def command_parser(
    prog: str, description: str, *examples: str, epilog: str = "", **kwargs: Any
) -> argparse.ArgumentParser:
    """Parser of a command, whose help ends in examples.

    Args:
        prog: how the command is started, where `started_as` has not said otherwise.
        description: one paragraph, or several lines that stay as they are.
        examples: arguments of a command line each.
        epilog: what the help says before them, one paragraph.
    """
    prog = _started[-1] if _started else prog
    if "\n" not in description:
        description = textwrap.fill(description, _HELP_WIDTH)
    ends = [textwrap.fill(epilog, _HELP_WIDTH)] if epilog else []
    if examples:
        ends.append("\n".join(["examples:", *(f"  {prog} {example}" for example in examples)]))
    return _Parser(
        prog=prog, description=description, epilog="\n\n".join(ends),
        formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs,
    )  # fmt: skip


@contextmanager
def started_as(prog: str) -> Iterator[None]:
    """Within the block, parsers say that their command is started so."""
    _started.append(prog)
    try:
        yield
    finally:
        _started.pop()


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Type of an option for argparse: a number of a kind that is not below `least`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"it is {text}, but it must be at least {least}")
        return value

    number.__name__ = kind.__name__  # what argparse calls it where a text is no number
    return number


def local_folder(text: str) -> Path:
    """Type of an argument for argparse: a folder on this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"it is '{text}', but it must be a local folder")
    return Path(text).expanduser()


_COLOUR = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
_COLOUR["help"] = "to normalise images with (default: as trained, else ImageNet's)"
# One name for each option, its older spellings in single commands, which stay valid, and what argparse is told of it.
_OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "--checkpoint": ((), {"required": True, "help": "teacher: a run's folder, or what else load_teacher opens"}),
    "--pooling": (("--output-tokens", "--embedding"), {
        "choices": ("cls", "cls_mean"), "default": "cls",
        "help": "class token, or followed by the mean patch token (%(default)s)",
    }),
    "--dtype": (("--autocast",), {
        "choices": ("fp32", "bf16", "fp16"), "help": "of the matmuls (default: bf16 on a GPU, fp32 on the CPU)",
    }),
    "--image-size": (("--size", "--resize"), {
        "type": int, "metavar": "PX", "help": "side of the network's input (default: as trained, else 224)",
    }),
    "--mean": ((), _COLOUR),
    "--std": ((), _COLOUR),
    "--device": ((), {"help": "cpu, cuda or cuda:N (default: the GPU where there is one)"}),
    "--workers": (("--num-workers",), {
        "type": at_least(1), "default": os.cpu_count() or 1, "help": "processes (%(default)s)",
    }),
    "--slide-root": ((), {"type": Path, "help": "folder that holds the listed slides, if they have moved"}),
    "--mpp-file": ((), {"type": Path, "help": "CSV 'slide,mpp': um per level-0 px, in place of what slides say"}),
    "--mpp-tolerance": ((), {
        "type": at_least(0, float), "default": 0.2,
        "help": "fraction by which slides may be coarser than what is asked, to which they are resampled (%(default)s)",
    }),
}  # fmt: skip


def add_options(parser: argparse._ActionsContainer, *names: str, **changed: Any) -> None:
    """Add options that several commands have to a parser; ``changed`` takes the place of what is common to them."""
    for name in names:
        older, arguments = _OPTIONS[name]
        parser.add_argument(name, *older, **(arguments | changed))
