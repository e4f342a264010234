"""Jobs over several processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dinov2.utils.jobs import run_jobs
from tests.helpers.commands import ROOT


def square(number: int) -> int:
    """A job."""
    return number * number


def kill_myself_on_three(number: int) -> int:
    """A job whose third run ends its process as the kernel does for want of memory."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_on_one(number: int) -> int:
    """A job that fails once."""
    if number == 1:
        raise ValueError("one")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_run_once_and_returned_with_its_place(workers: int):
    results = dict(run_jobs(square, [4, 3, 2], workers, "job"))
    assert results == {0: 16, 1: 9, 2: 4}


def test_no_jobs():
    assert list(run_jobs(square, [], 4, "job")) == []


def test_a_process_killed_from_outside_is_an_error_and_not_a_hang():
    with pytest.raises(ChildProcessError):
        list(run_jobs(kill_myself_on_three, [1, 2, 3, 4], 2, "job"))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_is_raised(workers: int):
    with pytest.raises(ValueError, match="one"):
        list(run_jobs(fail_on_one, [0, 1, 2], workers, "job"))


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    (tmp_path / "sleeper.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from pathlib import Path
            def sleep(path):
                Path(path).write_text(str(os.getpid()))
                time.sleep(600)
            """
        )
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sleeper import sleep\n"
        "from dinov2.utils.jobs import run_jobs\n"
        "if __name__ == '__main__': list(run_jobs(sleep, [sys.argv[1] + '/a', sys.argv[1] + '/b'], 2, 'job'))\n"
    )
    main = tmp_path / "main.py"
    main.write_text(program)
    environment = os.environ | {"PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    parent = subprocess.Popen([sys.executable, main, tmp_path], env=environment)
    names, deadline = [tmp_path / "a", tmp_path / "b"], time.monotonic() + 60
    while not all(name.exists() and name.read_text() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(name.read_text()) for name in names]
    parent.kill()
    parent.wait()
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(worker) for worker in workers)


def _runs(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


INTERRUPTED = """
import logging, sys
from dinov2.utils.cli import run_command
from dinov2.utils.jobs import run_jobs
from tests.helpers.commands import ROOT
from slow import work

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    jobs = [sys.argv[1]] * 3
    sys.exit(run_command(lambda: list(run_jobs(work, jobs, 2, "job")) and None, logging.getLogger("tool")))
"""
SLOW = """
import time
from pathlib import Path
from dinov2.utils.files import unfinished

def work(folder):
    with unfinished(Path(folder, "result")) as partial:
        partial.touch()
        time.sleep(600)
"""


def test_an_interrupted_command_gives_its_jobs_up_in_one_line(tmp_path: Path):
    """As Ctrl-C does on a terminal, of which all processes get the signal."""
    (tmp_path / "tool.py").write_text(INTERRUPTED)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "made").mkdir()
    process = subprocess.Popen(
        [sys.executable, "tool.py", "made"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while len(list((tmp_path / "made").iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and len(errors.splitlines()) == 1
    assert list((tmp_path / "made").iterdir()) == []
