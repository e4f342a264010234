"""Exit statuses of our torchrun."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SCRIPT = Path(__file__).parents[3] / "scripts/_torchrun.py"


@pytest.mark.parametrize(
    ("exits", "status", "told"),
    [
        ([-15, 143], 143, []),  # asked by SIGTERM; the other one was ended by the launcher while it came to its end
        ([-15, 75], 75, []),
        ([2, -15], 2, []),
        ([-9, -15], 76, ["Local rank 0"]),
        ([-9, 143], 76, ["Local rank 0"]),  # killed; the launcher asked the other one to end
        ([-15, 76], 76, []),
        ([-15, -15], 76, ["Local rank 0", "Local rank 1"]),
        ([1, -15], 76, []),
        ([1], None, []),  # a crash of all: the launcher shows its traceback
    ],
)
def test_status_of_processes_of_which_the_launcher_has_ended_some(
    exits: list[int], status: int | None, told: list[str], capsys: pytest.CaptureFixture[str]
):
    spec = importlib.util.spec_from_file_location("_torchrun", SCRIPT)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    failures = [ProcessFailure(rank, 1000 + rank, code, "") for rank, code in enumerate(exits)]
    assert module.status_of(failures) == status
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in said] == told


def test_an_interrupt_while_torch_is_imported_is_no_traceback():
    process = subprocess.Popen([sys.executable, SCRIPT, "train.py"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGINT
