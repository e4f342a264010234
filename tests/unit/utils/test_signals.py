"""Signals that ask to stop, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

WATCHED = """
import os, signal, sys, time
from dinov2.utils.signals import SignalWatch
with SignalWatch(lambda number: print(number.name, flush=True), lambda: print("again", flush=True)) as watch:
    print("ready", flush=True)
    while True:
        {body}
print("left", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
"""
UNTIL_NOTED = "time.sleep(0.01)\n        if watch.received: break"
# Waits in C without a look at Python, as within a collective.
IN_A_LIBRARY = "__import__('ctypes').CDLL(None).sleep(100)"


@contextmanager
def python(code: str, **options: object) -> Iterator[subprocess.Popen]:
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # tests may run under nohup
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_request_is_noted_and_interrupts_nothing(number: signal.Signals):
    with python(WATCHED.format(body=UNTIL_NOTED)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == f"{number.name}\nleft True\n"
        assert process.returncode == 0


def test_the_next_one_ends_a_process_that_waits_in_a_library_with_the_status_of_the_first():
    with python(WATCHED.format(body=IN_A_LIBRARY)) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):  # one request, passed on by several
            process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert (process.stdout.read(), process.wait(timeout=60)) == ("again\n", 75)


def test_a_signal_that_is_ignored_stays_so():
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    with python(WATCHED.format(body=UNTIL_NOTED), preexec_fn=ignore) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0] == "SIGTERM\nleft True\n"


def test_a_worker_heeds_its_parent_only():
    code = """
import os, signal, sys, time
from dinov2.utils.signals import heed_parent_only
child = os.fork()
if not child:
    heed_parent_only()
    print(os.getpid(), flush=True)
    time.sleep(100)
for line in sys.stdin:
    os.kill(child, signal.SIGTERM)
    print(os.waitpid(child, 0)[1], flush=True)
    break
"""
    with python(code, stdin=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(child, number)
        time.sleep(0.2)
        os.kill(child, 0)  # it lives
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_a_worker_that_is_stopped_ends_with_its_parent():
    code = """
import os, signal
from dinov2.utils.signals import heed_parent_only
child = os.fork()
if not child:
    heed_parent_only()
    os.kill(os.getpid(), signal.SIGSTOP)
os.waitpid(child, os.WUNTRACED)
os._exit(0)
"""
    with python(code) as process:
        process.communicate(timeout=60)  # returns when the last process that has the pipe is gone


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_a_child_learns_that_its_parent_is_gone():
    code = """
import os, signal, time
from dinov2.utils.signals import receive_when_parent_dies
if not os.fork():
    signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), os._exit(0)))
    receive_when_parent_dies()
    print("ready", flush=True)
    time.sleep(100)
time.sleep(100)
"""
    with python(code) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == "told\n"
