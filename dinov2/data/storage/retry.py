"""Requests to a server, repeated while the reason of a failure may pass."""

import errno
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_thread = threading.local()
OUTAGE_S = 1800.0
"""That a server may fail to answer, where no setting says."""

_LINE_S = 60.0  # between two lines about one server
_told: dict[str, float] = {}  # by server, when this process last told of a failure
# Names, not classes: those of the HTTP packages, of which none need be installed or loaded here.
_PASSING = {
    *["ConnectionError", "TimeoutError", "gaierror", "SSLError", "IncompleteRead", "JSONDecodeError"],  # Python
    *["TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"],  # httpx
    *["ClientConnectionError", "ClientPayloadError"],  # aiohttp
    *["HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "ResponseParserError"],  # botocore
    *["ServiceRequestError", "ServiceResponseError"],  # azure
}
_LASTING = {"SSLCertVerificationError", "OfflineModeIsEnabled"}
_NO_ROUTE = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class RemoteError(OSError):
    """A server that cannot be read; its `errno` tells it from a corrupt file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EIO


class GivenUp(Exception):
    """Nobody waits any more for what was asked for."""


def give_up_when(nobody_waits: threading.Event) -> None:
    """Let this thread's pauses before retries end with `GivenUp` as soon as the event is set."""
    _thread.nobody_waits = nobody_waits


def _pause(seconds: float) -> None:
    nobody_waits = getattr(_thread, "nobody_waits", None)
    if nobody_waits is None:
        time.sleep(seconds)
    elif nobody_waits.wait(seconds):
        raise GivenUp


class SharedPause:
    """A pause before a server is asked again, kept by all processes of one user on one machine.

    It is the modification time of an empty file, so nothing is locked and nothing to clean up. Where the file cannot
    be written, the process that was told to wait still waits, only the others do not.
    """

    def __init__(self, server: str, longest_s: float, folder: str = "") -> None:
        name = f"path-fm-pause-{os.getuid()}-{re.sub(r'[^A-Za-z0-9.-]', '_', server)}"
        self._path, self._longest_s = os.path.join(folder or tempfile.gettempdir(), name), longest_s

    def remaining_s(self) -> float:
        """Seconds until the server may be asked again; 0 if it may be asked now."""
        try:
            stat = os.lstat(self._path)
        except OSError:
            return 0.0
        left = stat.st_mtime - time.time()
        # Farther than any pause noted here: somebody else's file, or the clock was set back.
        foreign = stat.st_uid != os.getuid() or left > self._longest_s + 1
        return 0.0 if foreign else max(0.0, left)

    def extend(self, seconds: float) -> bool:
        """Make the pause last `seconds` from now, unless it already does; return whether this made it longer."""
        seconds = min(seconds, self._longest_s)
        if (left := self.remaining_s()) and left > seconds - 1:
            return False
        until = time.time() + seconds
        with suppress(OSError):
            file = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            with open(file, "w"):
                os.utime(file, (until, until))
        return True


@dataclass(frozen=True)
class Retries:
    """Repetition of a request. Waits double from retry to retry, with jitter, up to a bound."""

    outage_s: float = OUTAGE_S  # from the first failure on, after which a request is given up
    first_wait_s: float = 1.0  # longest wait before the first retry
    longest_wait_s: float = 60.0  # bound of the doubled waits
    longest_pause_s: float = 600.0  # bound of the time that a server may ask to be left alone
    connect_s: float = 10.0  # that a connection may take
    read_s: float = 60.0  # in which some bytes must come
    pause_folder: str = ""  # see `SharedPause`
    sleep: Callable[[float], None] = _pause
    clock: Callable[[], float] = time.monotonic

    def call(self, url: str, request: Callable[[], _Result]) -> _Result:
        """Give what `request` returns, repeated while it fails for a reason that may pass.

        A 429 holds up all processes of this machine's user that ask the same server. The URL appears in messages, so
        it must be one without credentials. RemoteError once the outage lasts too long; what cannot pass is raised as it
        comes.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception

        server = urlsplit(url).netloc
        pause = SharedPause(server, self.longest_pause_s, self.pause_folder)
        began: list[float] = []  # when the first failure was met

        def lasted() -> float:
            return self.clock() - began[0] if began else 0.0

        def hold_up(state: RetryCallState) -> None:
            if remaining := pause.remaining_s():
                self.sleep(remaining + self._jittered(self.first_wait_s))

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception()
            status, headers = answer(error)
            began[:] = began or [self.clock()]
            asked = min(_asked_wait(status, headers), self.longest_pause_s)
            doubled = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(state.attempt_number - 1, 60))
            seconds = asked + self._jittered(self.first_wait_s if asked else doubled)
            if status == HTTPStatus.TOO_MANY_REQUESTS:
                pause.extend(seconds)
            if lasted() < self.outage_s and self._is_due(server):
                values = url, reason(error), lasted(), self.outage_s / 60
                logger.warning("%s: %s; failing for %.0f s, and asked again for %g minutes", *values)
            return min(seconds, max(0.0, self.outage_s - lasted())) if not asked else seconds

        def give_up(state: RetryCallState) -> None:
            error = state.outcome.exception()
            limited = answer(error)[0] == HTTPStatus.TOO_MANY_REQUESTS
            advice = "set HF_TOKEN for a higher limit (Hugging Face)" if limited else "check the network"
            failure = f"'{url}' could not be read for {self.outage_s / 60:g} minutes ({reason(error)})"
            raise RemoteError(f"{failure}; {advice}, raise data.outage_minutes or train from a local copy") from error

        hooks = {"before": hold_up, "retry_error_callback": give_up, "retry": retry_if_exception(is_transient)}
        result = Retrying(sleep=self.sleep, stop=lambda _: lasted() >= self.outage_s, wait=wait, **hooks)(request)
        if lasted() > _LINE_S and _told.pop(server, None):
            logger.info("%s: answers again after %.0f s", url, lasted())
        return result

    def _is_due(self, server: str) -> bool:
        """Whether to tell of a failure: of all threads that meet it, one may, once a minute."""
        now = self.clock()
        if now - _told.get(server, -_LINE_S) < _LINE_S:
            return False
        _told[server] = now
        return True

    @staticmethod
    def _jittered(seconds: float) -> float:
        # The system's generator: the seeded ones belong to the training.
        return secrets.SystemRandom().uniform(seconds / 2, seconds)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: overload, timeouts, connections that do not come or break."""
    status, _ = answer(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return any(map(_is_passing, _causes(error))) and not any(_names(cause) & _LASTING for cause in _causes(error))


def answer(error: BaseException) -> tuple[int | None, dict[str, str]]:
    """HTTP status and lower-case headers behind an error of any HTTP package; None and {} if there are none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            meta = response.get("ResponseMetadata", {})
            status, headers = meta.get("HTTPStatusCode"), meta.get("HTTPHeaders")
        else:
            holder: Any = cause if response is None else response
            fields = (getattr(holder, name, None) for name in ("status_code", "status", "code"))
            status = next((field for field in fields if isinstance(field, int)), None)
            headers = getattr(holder, "headers", None)
        if isinstance(status, int) and status >= 400:
            return status, {key.lower(): value for key, value in (headers or {}).items()}
    return None, {}


def reason(error: BaseException) -> str:
    """Say in a few words why a request failed."""
    status, _ = answer(error)
    if status is not None:
        phrase = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
        return f"HTTP {status}{phrase}"
    cause = next(filter(_is_passing, _causes(error)), error)
    text = " ".join(str(cause).split())[:200]
    return f"{type(cause).__name__}" + (f" ({text})" if text else "")


def _is_passing(error: BaseException) -> bool:
    return getattr(error, "errno", None) in _NO_ROUTE or bool(_names(error) & _PASSING)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _asked_wait(status: int | None, headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to be left alone: Retry-After, or the hub's `"resolvers";r=0;t=34`."""
    after, seconds = headers.get("retry-after", "").strip(), 0.0
    if after.isdigit():
        seconds = float(after)
    elif after:
        with suppress(ValueError):
            date = parsedate_to_datetime(after)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time()
    used_up = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    if status == HTTPStatus.TOO_MANY_REQUESTS and used_up:
        seconds = max(seconds, float(used_up[1]))
    return max(0.0, seconds)
