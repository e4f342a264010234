"""The Genomic Data Commons' API: finding files, and their bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dinov2.data.storage.retry import Refusal, RemoteError, Retries, is_transient, reason
from prepatching_scripts.gdc.manifest import GdcFile

_Result = TypeVar("_Result")
_PAGE = 2000
_FIELDS = "file_id,file_name,md5sum,file_size,state"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def slide_filter(strategies: Sequence[str], projects: Sequence[str] = ()) -> dict[str, Any]:
    """Describe TCGA's open-access SVS slides in the API's terms.

    Args:
        strategies: "Diagnostic Slide" (paraffin), "Tissue Slide" (frozen), or both.
        projects: TCGA-BRCA, say; all of TCGA if empty.
    """
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


class ContentChanged(ConnectionError):
    """The server's file does not continue what was read of it before."""


class Gdc:
    """One server that speaks the GDC's API; may be used by several threads. A context manager.

    Args:
        endpoint: Its URL.
        retries: How long requests are repeated.
        token: For files of controlled access; sent as X-Auth-Token and told to nobody else.
        page: Files per answer to a query.

    Raises:
        ValueError: If the endpoint is no URL, or would get the token unencrypted.
    """

    def __init__(self, endpoint: str, retries: Retries, token: str = "", page: int = _PAGE) -> None:
        import httpx

        self.endpoint, self.retries, self._page = endpoint.rstrip("/"), retries, page
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint '{endpoint}' is no URL; https://api.gdc.cancer.gov, say, is expected")
        if token and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise ValueError(f"endpoint '{endpoint}' would get the token unencrypted; https is expected")
        self._has_token = bool(token)
        self._client = httpx.Client(
            headers={"X-Auth-Token": token} if token else {},
            # Another server must not see the token, which httpx would pass on.
            follow_redirects=not token,
            timeout=httpx.Timeout(retries.read_s, connect=retries.connect_s, pool=None),
            limits=httpx.Limits(max_connections=None),
        )

    def __enter__(self) -> "Gdc":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def locate(self, file: GdcFile) -> str:
        """Give the URL of a file's bytes."""
        return f"{self.endpoint}/data/{file.id}"

    def find(self, filters: dict[str, Any]) -> list[GdcFile]:
        """List all files that a filter describes, by id.

        Raises:
            ValueError: If the server does not understand the filter, or has a file that cannot be stored.
            RemoteError: If the server cannot be read, or its list changed meanwhile.
        """
        url, total = f"{self.endpoint}/files", None
        found: dict[str, GdcFile] = {}
        query = {"filters": filters, "fields": _FIELDS, "format": "JSON", "sort": "file_id:asc"}
        while total is None or len(found) < total:
            page = {**query, "size": self._page, "from": len(found)}
            hits, count = self.call(url, partial(self._get_page, url, page))
            new = {file.id: file for file in map(_from_hit, hits)}
            if (total is not None and count != total) or (count and not new.keys() - found.keys()):
                raise RemoteError(f"'{url}' changed while it was read; run the same command again")
            total = count
            found.update(new)
        return [found[key] for key in sorted(found)]

    def call(self, url: str, request: Callable[[], _Result]) -> _Result:
        """Repeat a request while it fails for a reason that may pass, and say plainly what failed in the end.

        Raises:
            FileNotFoundError: If the server has no such thing.
            PermissionError: If it may not be read.
            RemoteError: If the server cannot be read.
        """
        import httpx

        try:
            return self.retries.call(url, request)
        except RemoteError as error:
            if error.__cause__ is None or not is_transient(error.__cause__):
                raise
            why, count = reason(error.__cause__), self.retries.attempts
            tries = f"{count} tries" if count > 1 else "1 try"
            advice = "check the network and run the same command again, which goes on from there"
            message = f"'{url}' could not be read in {tries}, the last gave {why}; {advice}"
            raise RemoteError(message) from error
        except Refusal as error:
            raise self._in_plain_words(url, error) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"'{url}' could not be read: {reason(error)}") from error

    @contextmanager
    def stream(self, file: GdcFile, start: int) -> Iterator[Any]:
        """Ask once for a file's bytes from `start` on; gives the answer, 200 (all bytes) or 206 (those).

        Raises:
            Refusal: If the answer has another status.
            ContentChanged: If the bytes from `start` on are not to be had, those from 0 perhaps.
            ConnectionError: If it offers something else than this file.
        """
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._client.stream("GET", self.locate(file), headers=headers) as response:
            status, length = response.status_code, response.headers.get("content-length")
            if start and status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise ContentChanged(f"there is nothing from byte {start} on")
            if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                raise Refusal(status, response.headers)
            kind = response.headers.get("content-type", "").lower()
            if "html" in kind and not file.name.lower().endswith((".html", ".htm")):
                raise ConnectionError("a web page came in place of the file")
            wanted = f"bytes {start}-{file.size - 1}/{file.size}"
            if status == HTTPStatus.PARTIAL_CONTENT and response.headers.get("content-range") != wanted:
                raise ContentChanged(f"{response.headers.get('content-range')!r} came in place of '{wanted}'")
            if status == HTTPStatus.OK and length not in (None, str(file.size)):
                raise ConnectionError(f"{length} bytes are offered, {file.size} are expected")
            yield response

    def _get_page(self, url: str, query: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        response = self._client.post(url, json=query)
        if response.status_code == HTTPStatus.BAD_REQUEST:
            raise ValueError(f"'{url}' does not understand the filter: {response.text[:200]}")
        if response.status_code != HTTPStatus.OK:
            raise Refusal(response.status_code, response.headers)
        answer = response.json()
        try:
            return list(answer["data"]["hits"]), int(answer["data"]["pagination"]["total"])
        except (KeyError, TypeError) as error:
            message = f"'{url}' gave JSON without data.hits and data.pagination.total; is it a GDC API?"
            raise RemoteError(message) from error

    def _in_plain_words(self, url: str, refusal: Refusal) -> OSError:
        if refusal.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            advice = "the token in use may not read it" if self._has_token else "it needs a --token-file"
            return PermissionError(f"'{url}' is not open: HTTP {refusal.status}; {advice}")
        if refusal.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            return FileNotFoundError(f"'{url}' does not exist (any more); make a new manifest")
        return RemoteError(f"'{url}' answered HTTP {refusal.status}")


def _from_hit(hit: dict[str, Any]) -> GdcFile:
    try:
        name, md5, size = hit["file_name"], hit["md5sum"], int(hit["file_size"])
        return GdcFile(hit.get("file_id") or hit["id"], name, md5, size, hit.get("state") or "")
    except KeyError as error:
        raise ValueError(f"the server tells of a file without {error}: {str(hit)[:200]}") from error
