"""What is tried again, after which wait, and what is said in the end."""

import errno
import logging
import multiprocessing
import os
import pickle
import random
import socket
import ssl
import time
import uuid
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest

from dinov2.data.storage.retry import RemoteError, Retries, SharedPause, is_transient, reason

URL = "https://hub.example/datasets/org/tiles/resolve/abc/a.parquet"


class Failing:
    """Raises the given errors one after the other, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "bytes"


@pytest.fixture
def waits() -> list[float]:
    """Where waits are noted in place of waiting."""
    return []


@pytest.fixture
def retries(tmp_path: Path, waits: list[float]) -> Retries:
    """The defaults, on a clock that only waits move."""
    return Retries(pause_folder=str(tmp_path), sleep=waits.append, clock=lambda: sum(waits))


def refusal(status: int, headers: dict[str, str]) -> Exception:
    """What httpx raises for an answer."""
    response = httpx.Response(status, headers=headers)
    return httpx.HTTPStatusError("refused", request=httpx.Request("GET", URL), response=response)


def caused(error: Exception, cause: Exception) -> Exception:
    """An error with a cause."""
    error.__cause__ = cause
    return error


def s3_error(status: int) -> Exception:
    """What s3fs raises: an OSError whose cause has botocore's answer."""
    from botocore.exceptions import ClientError

    meta = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return caused(OSError(errno.EIO, "x"), ClientError({"Error": {}, "ResponseMetadata": meta}, "GetObject"))


TRANSIENT = [
    *(refusal(status, {}) for status in (408, 425, 429, 500, 502, 503, 504, 599)),
    ConnectionResetError(),
    ConnectionRefusedError(),
    BrokenPipeError(),
    TimeoutError(),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    OSError(errno.ENETUNREACH, "Network is unreachable"),
    ssl.SSLEOFError(),
    s3_error(503),
    caused(FileNotFoundError("fsspec hides the reason"), ConnectionResetError()),
]
LASTING = [
    *(refusal(status, {}) for status in (400, 401, 403, 404, 410, 416)),
    FileNotFoundError(),
    PermissionError(),
    IsADirectoryError(),
    ValueError(),
    KeyError(),
    RemoteError("gave others"),
    ssl.SSLCertVerificationError(),
    caused(ConnectionError(), ssl.SSLCertVerificationError()),
    s3_error(403),
    s3_error(404),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_tried_again(retries: Retries, waits: list[float], error: Exception) -> None:
    request = Failing(error)
    assert retries.call(URL, request) == "bytes"
    assert request.calls == 2
    # No time passes here, so that the pause after a 429 still holds at the second try.
    assert len(waits) == (2 if "429" in reason(error) else 1)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_cannot_pass_is_raised_at_once(retries: Retries, waits: list[float], error: Exception) -> None:
    request = Failing(error)
    with pytest.raises(type(error)) as caught:
        retries.call(URL, request)
    assert caught.value is error
    assert request.calls == 1
    assert waits == []


def test_errors_of_the_http_packages_are_known() -> None:
    import aiohttp
    import botocore.exceptions as boto
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    with pytest.raises(Exception) as refused:
        get_session().get("http://127.0.0.1:1")
    assert is_transient(refused.value)
    with pytest.raises(Exception) as unknown:
        get_session().get("nothing://127.0.0.1:1")
    assert not is_transient(unknown.value)
    assert is_transient(aiohttp.ServerDisconnectedError())
    assert is_transient(aiohttp.ClientPayloadError())
    assert is_transient(boto.EndpointConnectionError(endpoint_url="x"))
    assert is_transient(boto.ReadTimeoutError(endpoint_url="x"))
    assert not is_transient(boto.NoCredentialsError())
    assert not is_transient(OfflineModeIsEnabled())


def test_waits_double_up_to_the_bound_and_are_jittered(retries: Retries, waits: list[float]) -> None:
    with pytest.raises(RemoteError):
        replace(retries, outage_s=50_000).call(URL, Failing(*[refusal(503, {})] * 2000))
    *waits, last = waits
    assert len(waits) > 800 and sum(waits) + last == pytest.approx(50_000)
    for i, wait in enumerate(waits):
        longest = min(60, 2 ** min(i, 10))
        assert longest / 2 <= wait <= longest
    assert len({wait for wait in waits if wait > 30}) > 700


def dated(headers: dict[str, str]) -> dict[str, str]:
    """Headers in which "in SECONDS" is a date as HTTP writes it."""
    return {
        name: formatdate(time.time() + int(value[3:]), usegmt=True) if value.startswith("in ") else value
        for name, value in headers.items()
    }


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (503, {"Retry-After": "34"}, 34),
        (429, {"retry-after": "34"}, 34),
        (429, {"Retry-After": "in 34"}, 34),
        (429, {"RateLimit": '"resolvers";r=0;t=34'}, 34),
        (429, {"ratelimit": '"api"; r=0; t=34', "Retry-After": "5"}, 34),
        (429, {"ratelimit": '"api";r=0;t=99999999999999999999'}, 600),
        (429, {"Retry-After": "9" * 400}, 600),
        (429, {"Retry-After": "in 100000000"}, 600),
    ],
)
def test_the_time_that_the_server_names_is_kept(
    retries: Retries, waits: list[float], status: int, headers: dict[str, str], seconds: float
) -> None:
    retries.call(URL, Failing(refusal(status, dated(headers))))
    assert seconds - 2 < waits[0] <= seconds + 1


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, {"ratelimit": '"api";r=0;t=34'}),  # the limit is not why
        (429, {"ratelimit": '"api";r=7;t=34'}),
        (429, {"Retry-After": "soon"}),
        (429, {"Retry-After": "in -100"}),
        (429, {"Retry-After": ""}),
    ],
)
def test_other_headers_do_not_hold_up(
    retries: Retries, waits: list[float], status: int, headers: dict[str, str]
) -> None:
    retries.call(URL, Failing(refusal(status, dated(headers))))
    assert 0.5 <= waits[0] <= 1


@pytest.mark.parametrize(
    ("error", "outage_s", "told"),
    [
        (refusal(503, {}), 90, ["1.5 minutes", "HTTP 503 (Service Unavailable)", "check the network"]),
        (refusal(429, {}), 0, ["0 minutes", "HTTP 429 (Too Many Requests)", "set HF_TOKEN"]),
        (ConnectionError("9 of 10\nbytes came"), 60, ["1 minutes", "ConnectionError (9 of 10 bytes came)"]),
    ],
)
def test_giving_up_names_url_time_reason_and_what_to_do(
    retries: Retries, waits: list[float], error: Exception, outage_s: float, told: list[str]
) -> None:
    request = Failing(*[error] * 50)
    with pytest.raises(RemoteError) as caught:
        replace(retries, outage_s=outage_s).call(URL, request)
    assert sum(waits) == pytest.approx(outage_s) and request.calls == 1 + len(waits)
    assert all(part in str(caught.value) for part in [URL, *told])
    assert caught.value.errno == errno.EIO  # a reader takes errors without one for corrupt files
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.errno) == (str(caught.value), errno.EIO)


def test_of_an_outage_is_told_at_once_and_once_a_minute(
    retries: Retries, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    servers = [f"https://{uuid.uuid4().hex}/shard" for _ in range(2)]  # nothing was told of these yet
    assert retries.call(servers[0], Failing(*[refusal(503, {})] * 40)) == "bytes"
    *warnings, end = caplog.records
    assert {record.levelname for record in warnings} == {"WARNING"} and end.levelname == "INFO"
    assert sum(waits) / 120 <= len(warnings) <= 1 + sum(waits) / 60  # a minute's end may fall into a wait
    caplog.clear()
    for _ in range(20):  # as many threads, which meet the same limit
        replace(retries, clock=lambda: 0.0).call(servers[1], Failing(refusal(429, {"Retry-After": "100"})))
    assert len(caplog.records) == 1


def test_seeded_generators_are_left_alone(retries: Retries) -> None:
    before = random.getstate()
    retries.call(URL, Failing(TimeoutError(), TimeoutError()))
    assert random.getstate() == before


def test_a_limit_holds_up_other_processes_that_ask_the_same_server(retries: Retries, waits: list[float]) -> None:
    limited = Failing(refusal(429, {"Retry-After": "120"}))
    other = multiprocessing.get_context("fork").Process(target=replace(retries, outage_s=0).call, args=(URL, limited))
    other.start()
    other.join()
    assert other.exitcode == 1  # gave up
    assert retries.call("https://other.example/a.parquet", Failing()) == "bytes"
    assert waits == []
    request = Failing()
    assert retries.call(URL.replace("a.parquet", "b.parquet"), request) == "bytes"
    assert request.calls == 1
    assert len(waits) == 1
    assert 60 < waits[0] <= 122


def test_a_pause_ends_and_is_only_made_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pause, same = SharedPause("hub:80", 600, str(tmp_path)), SharedPause("hub:80", 600, str(tmp_path))
    assert pause.remaining_s() == 0
    assert pause.extend(50)
    assert 40 < same.remaining_s() <= 50
    assert not same.extend(20)
    assert 40 < pause.remaining_s() <= 50
    assert same.extend(10**9)
    assert 590 < pause.remaining_s() <= 600
    short = SharedPause("other", 600, str(tmp_path))
    assert short.extend(0.5)
    assert 0 < short.remaining_s() <= 0.5
    later = time.time() + 601
    monkeypatch.setattr(time, "time", lambda: later)
    assert pause.remaining_s() == 0


def test_a_file_that_is_no_pause_of_ours_does_not_hold_up(tmp_path: Path) -> None:
    pause = SharedPause("hub", 600, str(tmp_path))
    pause.extend(5)
    path = next(tmp_path.iterdir())
    os.utime(path, (time.time() + 10**7,) * 2)
    assert pause.remaining_s() == 0
    path.unlink()
    target = tmp_path / "mine"
    target.touch()
    before = target.stat().st_mtime_ns
    path.symlink_to(target)
    pause.extend(100)
    assert target.stat().st_mtime_ns == before


def test_where_no_pause_can_be_kept_the_caller_still_waits(waits: list[float]) -> None:
    retries = Retries(pause_folder="/nowhere", sleep=waits.append, clock=lambda: sum(waits))
    assert retries.call(URL, Failing(refusal(429, {"Retry-After": "50"}))) == "bytes"
    assert 50 < waits[0] <= 51


def test_it_can_be_sent_to_other_processes() -> None:
    retries: Any = Retries(outage_s=2)
    assert pickle.loads(pickle.dumps(retries)) == retries
