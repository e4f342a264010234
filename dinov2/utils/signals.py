"""Signals that ask a process to stop: noticed whatever it waits for, acted upon once, and meant for it alone."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

# Exit status after each; 75 is EX_TEMPFAIL of sysexits.h: to be run again.
STATUS_OF = {
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGHUP: 128 + signal.SIGHUP,
    signal.SIGUSR1: 75,
}
_END = b"\0"
_ONE_REQUEST_S = 2.0  # a launcher, a terminal and Slurm may each pass on what was one request


class SignalWatch:
    """While entered, the signals above that are not ignored interrupt nothing: the first is noted in ``received``.

    A thread of its own reads them, since the main thread may be within a collective, where no Python runs. The next
    request ends the process at once, with the status of the first.

    Args:
        on_first: called with the first signal, in that thread.
        on_next: called before the process ends.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None], on_next: Callable[[], None]):
        self.received: signal.Signals | None = None
        self._on_first, self._on_next = on_first, on_next

    def __enter__(self) -> "SignalWatch":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as Python demands of a wake-up descriptor
        handled = (number for number in STATUS_OF if signal.getsignal(number) is not signal.SIG_IGN)
        self._earlier = {number: signal.signal(number, _pass) for number in handled}
        self._earlier_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        signal.set_wakeup_fd(self._earlier_fd)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        os.write(self._write, _END)  # closing would not wake the thread: forked children have the pipe open, too
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _watch(self) -> None:
        first = 0.0
        while (data := os.read(self._read, 1)) != _END:
            number = data[0]
            if number not in self._earlier:  # of another handler, such as a timer's
                continue
            if self.received is None:
                self.received, first = signal.Signals(number), time.monotonic()
                self._on_first(self.received)
            elif time.monotonic() - first > _ONE_REQUEST_S:
                self._on_next()
                os._exit(STATUS_OF[self.received])


def heed_parent_only() -> None:
    """In a child process: leave signals for the whole group to the parent, of which SIGTERM alone ends this one.

    Launchers and Slurm signal all processes. A worker that ended over that would take from its parent what it needs to
    come to an end. With the parent it is killed: one that hangs would keep the lock on the run's folder, which it has
    inherited.
    """
    receive_when_parent_dies(signal.SIGKILL)
    signal.set_wakeup_fd(-1)  # the parent's, after a fork
    signal.pthread_sigmask(signal.SIG_BLOCK, STATUS_OF)
    parent = os.getppid()

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(STATUS_OF)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def receive_when_parent_dies(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when the thread that started it ends, however it does. On Linux only."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, number)


def _pass(number: int, frame: object) -> None:
    """Python's part of a handler; the interpreter has written the number to the descriptor before."""
