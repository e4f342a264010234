"""Common parts of all commands: exit statuses, how errors end a command, and one name for each option."""

import argparse
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Exit statuses.
DONE = 0
FAILURES = 1  # done, but some items failed and are listed
USER_ERROR = 2  # one sentence has said what the user can mend
INTERRUPTED = 128 + signal.SIGINT  # Ctrl-C: 130
TERMINATED = 128 + signal.SIGTERM  # 143


class Terminated(BaseException):
    """SIGTERM arrived; like `KeyboardInterrupt`, it unwinds the stack so that what is unfinished is removed."""


class ToldElsewhere(RuntimeError):
    """An end whose reason another process of the same command says."""


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
        errors: exceptions, beside ValueError, OSError and ImportError, whose text is a sentence for the user.
        resumable: the same command goes on where it was stopped, which the last sentence says.
    """
    goes_on = "the same command goes on from here." if resumable else "nothing unfinished was kept."

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    previous = None
    with suppress(ValueError):  # not the main thread, which alone may set handlers
        previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return body() or DONE
    except ToldElsewhere:
        return USER_ERROR
    except (ValueError, OSError, ImportError, *errors) as error:
        logger.error("%s", error)
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR
    except KeyboardInterrupt:
        logger.error("Interrupted; %s", goes_on)
        return INTERRUPTED
    except Terminated:
        logger.error("Terminated; %s", goes_on)
        return TERMINATED
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


# One name for each option. The spellings after the first are older ones of single commands and stay valid.


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    """``--checkpoint``: the teacher."""
    parser.add_argument("--checkpoint", required=True, help="teacher: a file or URL that dinov2.hub.load_teacher opens")


def add_pooling(parser: argparse._ActionsContainer) -> None:
    """``--pooling``: what of the tokens is the embedding."""
    parser.add_argument(
        "--pooling", "--output-tokens", "--embedding", choices=("cls", "cls_mean"), default="cls",
        help="class token, or followed by the mean patch token (%(default)s)",
    )  # fmt: skip


def add_dtype(
    parser: argparse._ActionsContainer,
    default: str | None = None,
    what: str = "of the matmuls (default: bf16 on a GPU, fp32 on the CPU)",
) -> None:
    """``--dtype``: of the network's matmuls, or of what is written."""
    parser.add_argument("--dtype", "--autocast", choices=("fp32", "bf16", "fp16"), default=default, help=what)


def add_image_size(
    parser: argparse._ActionsContainer, what: str = "side of the network's input (default: as trained, else 224)"
) -> None:
    """``--image-size``: side of the network's input."""
    parser.add_argument("--image-size", "--size", "--resize", type=int, metavar="PX", help=what)


def add_colours(parser: argparse._ActionsContainer) -> None:
    """``--mean``, ``--std``: of the normalisation."""
    about = "to normalise images with (default: as trained, else ImageNet's)"
    for name in ("--mean", "--std"):
        parser.add_argument(name, type=float, nargs=3, metavar=("R", "G", "B"), help=about)


def add_device(parser: argparse._ActionsContainer) -> None:
    """``--device``."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU where there is one)")


def add_workers(parser: argparse._ActionsContainer, default: int | None = None, what: str = "processes") -> None:
    """``--workers``: processes or threads beside the main one."""
    count = default if default is not None else os.cpu_count() or 1
    parser.add_argument("--workers", "--num-workers", type=int, default=count, help=f"{what} (%(default)s)")


def add_mpp_file(parser: argparse._ActionsContainer) -> None:
    """``--mpp-file``: table of resolutions."""
    about = "CSV 'slide,mpp': um per level-0 px of slides that do not say theirs"
    parser.add_argument("--mpp-file", type=Path, help=about)
