"""Watching for a rank that hangs: its main thread says what it does, a thread of its own looks at the clock."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dinov2.distributed import get_global_rank, get_global_size
from dinov2.train.state import TrainState
from dinov2.utils.cli import LOST

logger = logging.getLogger("dinov2")

_LOOK_S, _BEAT_S = 1.0, 5.0  # between two looks at the clock, and two signs of life
_SAY_S = 60.0  # of waiting after which a warning comes, and comes again
_AWAKE_LOOKS = 10  # looks that this thread may be late by on a busy machine
_STALE_S = 4 * _BEAT_S  # after which a rank that shows no sign is taken for dead or stopped


@dataclass(frozen=True, eq=False)
class _Phase:
    name: str
    since: float  # seconds since 1970
    limit_s: float


class Watchdog:
    """Ends this process, and so the job, where a phase of a step takes longer than its limit.

    While entered, each rank writes a line of JSON, ``logs/heartbeat.rank<R>.json`` (step, samples, phase, since, time),
    every five seconds, for outside monitors and for the other ranks: whoever ends the job names those that are behind.
    A rank that waits for others has a minute more than one that waits for something else, which therefore speaks first.

    Args:
        folder: of the run.
        state: progress, which the trainer advances.
        hang_s: seconds that a phase may take; 0: no limit.
        start_s: the same for a long one, such as the first step of this process, in which things are compiled.
        outage_s: seconds that servers may fail to answer, which any phase may take in addition: one that a rank waits
            for, or others for that rank. 0 once it is known that nothing comes over a network.
    """

    def __init__(self, folder: Path, state: TrainState, hang_s: float, start_s: float, outage_s: float = 0.0):
        self.state, self._hang_s, self._start_s, self.outage_s = state, hang_s, start_s, outage_s
        self._rank, self._ranks, self._logs = get_global_rank(), get_global_size(), folder / "logs"
        self._phase: _Phase | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            self._file(self._rank).unlink(missing_ok=True)  # nothing is alive that a monitor could look for

    @contextmanager
    def phase(self, name: str, *, with_others: bool = False, is_long: bool = False) -> Iterator[None]:
        """Name what the main thread does within the block: ``with_others`` where it may wait for other ranks.

        Blocks may lie in one another; after an inner one the outer begins anew.
        """
        limit, around = self._start_s if is_long else self._hang_s, self._phase
        limit += self.outage_s + (_SAY_S if with_others else 0) if limit else float("inf")
        self._phase = _Phase(name, time.time(), limit)
        try:
            yield
        finally:
            self._phase = around and replace(around, since=time.time())

    def _watch(self) -> None:
        current, waited, due, looked, beaten = None, 0.0, 0.0, time.monotonic(), float("-inf")
        while not self._stop.wait(_LOOK_S):
            phase, now = self._phase, time.monotonic()
            # Where this thread was not woken either, the whole process was suspended, which is no waiting.
            passed, looked = min(now - looked, _AWAKE_LOOKS * _LOOK_S), now
            if now - beaten > _BEAT_S:
                self._beat(phase)
                beaten = now
            if phase is None:
                continue
            if phase is not current:
                current, waited, due = phase, 0.0, _SAY_S
            waited += passed
            if waited > phase.limit_s:
                told = self._describe(phase, waited), phase.limit_s, self._others()
                logger.error("%s; the limit is %.0f s, so that the run ends here. %s", *told)
                os._exit(LOST)
            if waited > due:
                due += _SAY_S
                logger.warning("%s. %s", self._describe(phase, waited), self._others())

    def _describe(self, phase: _Phase, waited: float) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(phase.since))
        state = self.state
        return (
            f"Rank {self._rank} has been {phase.name} since {since}, for {waited:.0f} s, after step {state.step} and "
            f"{state.samples} samples"
        )

    def _others(self) -> str:
        """Ranks that show no sign, or are at an earlier step than this one."""
        behind = []
        for rank in range(self._ranks):  # an earlier launch that was killed may have had more
            try:
                beat = json.loads(self._file(rank).read_text())
                silent, step, phase = time.time() - beat["time"], int(beat["step"]), beat["phase"]
            except (OSError, ValueError, LookupError, TypeError):  # gone, being written, or not ours
                continue
            if rank != self._rank and (silent > _STALE_S or step < self.state.step):
                sign = f"no sign for {silent:.0f} s, " if silent > _STALE_S else ""
                behind.append(f"rank {rank} ({sign}{phase or 'between phases'}, step {step})")
        return f"Behind are {', '.join(behind)}." if behind else "No other rank is behind."

    def _beat(self, phase: _Phase | None) -> None:
        name, since = (phase.name, phase.since) if phase else (None, None)
        beat = {"rank": self._rank, **vars(self.state), "phase": name, "since": since, "time": time.time()}
        path = self._file(self._rank)
        beside = path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk: whoever writes something that counts says so
            beside.write_text(json.dumps(beat) + "\n")
            beside.replace(path)

    def _file(self, rank: int) -> Path:
        return self._logs / f"heartbeat.rank{rank}.json"
