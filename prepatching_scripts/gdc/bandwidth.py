"""A bound on bytes per second that several threads keep together."""

import threading
import time
from collections.abc import Callable


class Bandwidth:
    """A token bucket that lends: bytes are taken first and waited for after, in the order in which they came.

    Over any time of s seconds at most rate * (s + burst_s) bytes are taken, beyond one piece per thread. Time
    in which nothing is taken saves up no more than the burst.

    Args:
        rate: Bytes per second; None is no bound.
        burst_s: Seconds' worth of bytes that may come at once.
        clock: Seconds of a clock that never goes back.
        sleep: Waits a number of seconds.
    """

    def __init__(
        self,
        rate: float | None,
        burst_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(f"a bandwidth of {rate} bytes per second lets nothing pass; give more than 0")
        self._rate, self._burst_s, self._clock, self._sleep = rate, burst_s, clock, sleep
        self._lock, self._paid_until = threading.Lock(), -float("inf")

    def take(self, num_bytes: int) -> None:
        """Count bytes that came and wait until the bound allows the next."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._paid_until = max(self._paid_until, now - self._burst_s) + num_bytes / self._rate
            wait = self._paid_until - now
        if wait > 0:
            self._sleep(wait)
