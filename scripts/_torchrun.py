"""torchrun, but silent where a process has said in a sentence why it ended, and patient where it was asked to."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

sys.path.insert(0, str(Path(__file__).parents[1]))

from dinov2.utils.cli import USER_ERROR
from dinov2.utils.signals import STATUS_OF


def main() -> int:
    """Run the command line of ``python -m torch.distributed.run``."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # PET_<OPTION> is the default of each option; those of newer versions are nothing to older ones.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in STATUS_OF))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "3600")  # for a checkpoint; a second signal does not wait
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        for failure in error.failures.values():
            if failure.exitcode < 0:
                how = signal.Signals(-failure.exitcode).name
                sys.stderr.write(f"Local rank {failure.local_rank} (process {failure.pid}) was ended by {how}.\n")
        told = {USER_ERROR, *STATUS_OF.values()} & {failure.exitcode for failure in error.failures.values()}
        if told:
            return min(told)
        raise
    except SignalException as error:
        return STATUS_OF.get(error.sigval, 128 + error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
