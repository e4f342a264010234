"""The Genomic Data Commons' API: requests that are repeated, and queries for files."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, before_sleep_log, retry_if_exception, stop_after_attempt
from tenacity import wait_random_exponential as random_wait

from prepatching_scripts.gdc.manifest import GdcFile

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_FIELDS = ("file_id", "file_name", "md5sum", "file_size", "state")
_CLOSED, _GONE = "give a --token-file that may read it", "make a new manifest"
_ADVICE = {401: _CLOSED, 403: _CLOSED, 404: _GONE, 410: _GONE}


def slide_filter(strategies: Sequence[str], projects: Sequence[str] = ()) -> dict[str, Any]:
    """Describe TCGA's open-access SVS slides ("Diagnostic Slide", "Tissue Slide"), of all projects if none is named."""
    wanted = {
        "cases.project.program.name": ["TCGA"],
        "data_format": ["SVS"],
        "access": ["open"],
        "experimental_strategy": list(strategies),
    }
    if projects:
        wanted["cases.project.project_id"] = list(projects)
    terms = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    return {"op": "and", "content": terms}


class BrokenAnswer(ConnectionError):
    """An answer that is not what was asked for; another may be."""


class Gdc:
    """One server that speaks the GDC's API; may be used by several threads.

    Args:
        endpoint: its URL.
        token: for files of controlled access; sent as X-Auth-Token and told to nobody else.
        attempts: requests in all while the reason of failure may pass.
        wait_s: longest wait after the first, doubled from one to the next.
        read_s: time in which some bytes must come.

    Raises:
        ValueError: if the endpoint is not a URL, or would get the token unencrypted.
    """

    def __init__(
        self, endpoint: str, token: str = "", attempts: int = 8, wait_s: float = 1.0, read_s: float = 60.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        url = httpx.URL(endpoint.rstrip("/"))
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"Endpoint '{endpoint}' is not a URL; https://api.gdc.cancer.gov, say, is expected.")
        if token and url.scheme == "http" and url.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"Endpoint '{endpoint}' would get the token unencrypted; https is expected.")
        self.endpoint = str(url)
        self._attempts, self._wait_s, self._sleep = attempts, wait_s, sleep
        self.client = httpx.Client(
            headers={"X-Auth-Token": token} if token else {},
            follow_redirects=not token,  # another server must not see the token, which httpx would pass on
            timeout=httpx.Timeout(read_s, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None),
        )

    def call(self, url: str, request: Callable[[], _Result]) -> _Result:
        """Repeat a request while it fails for a reason that may pass; ConnectionError says why it failed in the end."""

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception()
            asked = error.response.headers.get("retry-after", "") if _status(error) else ""
            return min(float(asked), 600.0) if asked.isdigit() else random_wait(self._wait_s, 300.0)(state)

        retrying = Retrying(
            retry=retry_if_exception(_may_pass), stop=stop_after_attempt(self._attempts), wait=wait,
            sleep=self._sleep, before_sleep=before_sleep_log(logger, logging.WARNING), reraise=True,
        )  # fmt: skip
        try:
            return retrying(request)
        except (httpx.HTTPError, BrokenAnswer) as error:
            status = _status(error)
            reason = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
            advice = _ADVICE.get(status, "check the network and run the same command again, which goes on")
            raise ConnectionError(f"'{url}' could not be read ({reason}); {advice}.") from error

    def find(self, filters: dict[str, Any], page: int = 2000) -> list[GdcFile]:
        """List all files that a filter describes, by id; asks for `page` of them at a time.

        Raises:
            ValueError: if the server has a file that cannot be stored.
            ConnectionError: if the server cannot be read, or its list changed meanwhile.
        """
        url, found, total = f"{self.endpoint}/files", {}, None
        query = {"filters": filters, "fields": ",".join(_FIELDS), "format": "JSON", "sort": "file_id:asc"}

        def ask() -> tuple[list[GdcFile], int]:
            answer = self.client.post(url, json={**query, "size": page, "from": len(found)})
            answer.raise_for_status()
            try:
                data = answer.json()["data"]
                rows = [[hit[name] for name in _FIELDS] for hit in data["hits"]]
                total = int(data["pagination"]["total"])
            except (ValueError, KeyError, TypeError) as error:
                raise BrokenAnswer(f"no list of files, is it a GDC API? {error!r}") from error
            return [GdcFile(*row) for row in rows], total

        while total is None or len(found) < total:
            files, count = self.call(url, ask)
            if total not in (None, count) or (count and {file.id for file in files} <= found.keys()):
                raise ConnectionError(f"'{url}' changed while it was read; run the same command again.")
            total = count
            found |= {file.id: file for file in files}
        return [found[key] for key in sorted(found)]


def _status(error: BaseException | None) -> int | None:
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return isinstance(error, (httpx.TransportError, BrokenAnswer))
