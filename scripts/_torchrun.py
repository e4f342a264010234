"""torchrun, but silent where a process has said in a sentence why it ended, and patient where it was asked to."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

# No traceback of the imports, which take seconds, until torchrun has handlers of its own; what is ignored stays so.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torch.distributed.elastic.agent.server import WorkerGroup
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

sys.path.insert(0, str(Path(__file__).parents[1]))

from dinov2.utils.cli import LOST, USER_ERROR
from dinov2.utils.signals import STATUS_OF

_MEANT = {USER_ERROR, *STATUS_OF.values()}  # ends that a start in the same place would only repeat


class _Agent(LocalElasticAgent):
    """Does not start those anew (``--max-restarts``) that have ended because they were asked to or cannot go on."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in _MEANT for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def status_of(failures: Collection[ProcessFailure]) -> int | None:
    """The exit status for processes that have failed, of which those that were killed are named; None for crashes."""
    # As soon as one has left, the launcher ends the others by SIGTERM: those that had not come to their end by then.
    own = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or list(failures)
    for failure in own:
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
            sys.stderr.write(f"Local rank {failure.local_rank} (process {failure.pid}) was ended by {how}.\n")
    statuses = {LOST if failure.exitcode < 0 else failure.exitcode for failure in own}
    return min(statuses & {LOST, *_MEANT}, default=LOST if len(own) < len(failures) else None)


def main() -> int:
    """Run the command line of ``python -m torch.distributed.run``."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # PET_<OPTION> is the default of each option; those of newer versions are nothing to older ones.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in STATUS_OF))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "3600")  # for a checkpoint; a second signal does not wait
    # Processes that are started again must not meet in the store of those before them, whose keys they would read.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    api.LocalElasticAgent = _Agent
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        if status := status_of(error.failures.values()):
            return status
        raise
    except SignalException as error:
        return STATUS_OF.get(error.sigval, 128 + error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
