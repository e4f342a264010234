"""torchrun, but silent where a process ended over something that the user can mend and has said so in a sentence."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

USER_ERROR = 2  # exit status of dinov2/train/train.py where that is so


def main() -> int:
    """Run the command line of ``python -m torch.distributed.run``."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        if USER_ERROR in (failure.exitcode for failure in error.failures.values()):
            return USER_ERROR
        raise
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
