"""A stand-in for the Genomic Data Commons' API: queries for files, and their bytes by ranges.

with GdcServer() as gdc:
    slide = gdc.add("TCGA-AA-0001-01Z-00-DX1.svs", content, project="TCGA-LUAD")
    gdc.faults[slide.id] = [Fault("503"), None, Fault("cut")]
"""

import hashlib
import json
import re
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

_BLOCK = 1 << 14


class Fault(NamedTuple):
    """What goes wrong with one request.

    A status with headers; "drop" (no answer), "hang" (none for long), "cut" (half of the body), "stall" (half,
    then silence), "wrong" (another byte in it), "html" (a web page), "short" (another length), "shifted" (a
    range other than asked), "endless" (no length, and too much), "chunked" (no length).
    """

    kind: str
    headers: tuple[tuple[str, str], ...] = ()


class Stored(NamedTuple):
    """One file of the server, as a manifest has it."""

    id: str
    name: str
    md5: str
    size: int

    def line(self) -> str:
        """Its line of a manifest."""
        return f"{self.id}\t{self.name}\t{self.md5}\t{self.size}\treleased\n"


class GdcServer:
    """Serves files on 127.0.0.1; a context manager.

    Attributes:
        url: The endpoint.
        contents: Bytes by id.
        records: What queries search, by id.
        faults: By id, or "files" for queries: consumed by one item per request; None is no fault.
        always: A fault of each request, by id.
        requests: How many came, by id or "files".
        ranges: Range headers by id, in the order in which they came; "" where there was none.
        bytes_sent: Bytes of bodies by id.
        controlled: Ids that need the token "granted".
        tokens_seen: What came as X-Auth-Token.
        queries: Bodies of the queries.
        ignores_ranges: Whether whole files are sent whatever is asked for.
        at_once: Most transfers that there were at a time.
    """

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, Iterable[Fault | None]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.ranges: defaultdict[str, list[str]] = defaultdict(list)
        self.controlled: set[str] = set()
        self.tokens_seen: set[str] = set()
        self.queries: list[dict[str, Any]] = []
        self.ignores_ranges, self.at_once, self.meeting = False, 0, threading.Barrier(1)
        self._transfers, self.lock, self.closing = 0, threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"gdc": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that leave
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "GdcServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, content: bytes, project: str = "TCGA-LUAD", **values: str) -> Stored:
        """Add an open-access diagnostic slide, unless `values` say otherwise."""
        key = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
        stored = Stored(key, name, hashlib.md5(content).hexdigest(), len(content))
        self.contents[key] = content
        self.records[key] = {
            "id": key,
            "file_id": key,
            "file_name": name,
            "md5sum": stored.md5,
            "file_size": stored.size,
            "state": "released",
            "data_format": "SVS",
            "access": "open",
            "experimental_strategy": "Diagnostic Slide",
            "cases": [{"project": {"project_id": project, "program": {"name": project.split("-")[0]}}}],
            **values,
        }
        return stored

    def begin(self, key: str, headers: Any) -> Fault | None:
        """Count a request and draw its fault."""
        with self.lock:
            self.requests[key] += 1
            self.ranges[key].append(headers.get("range", ""))
            self.tokens_seen |= {headers.get("x-auth-token", "")} - {""}
            schedule = self.faults[key] = iter(self.faults.get(key, ()))
            return next(schedule, self.always.get(key))

    def count_transfer(self, change: int) -> None:
        """Note that a transfer begins (1) or ends (-1)."""
        with self.lock:
            self._transfers += change
            self.at_once = max(self.at_once, self._transfers)


class _Handler(BaseHTTPRequestHandler):
    gdc: GdcServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Be silent."""

    def do_POST(self) -> None:
        """Answer a query."""
        query = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.gdc.begin("files", self.headers)
        if fault and self._fail(fault):
            return None
        if self.path != "/files":
            return self._refuse(404, "not found")
        self.gdc.queries.append(query)
        try:
            found = [record for record in self.gdc.records.values() if _matches(record, query["filters"])]
        except KeyError as error:
            return self._refuse(400, f"{error} is not an operator")
        field, _, order = query.get("sort", "file_id:asc").partition(":")
        found.sort(key=lambda record: record[field], reverse=order == "desc")
        start, size = int(query.get("from", 0)), int(query.get("size", 10))
        wanted = set(query["fields"].split(",")) | {"id"}
        hits = [{k: v for k, v in record.items() if k in wanted} for record in found[start : start + size]]
        pages = {"count": len(hits), "total": len(found), "size": size, "from": start}
        return self._json(200, {"data": {"hits": hits, "pagination": pages}, "warnings": {}})

    def do_GET(self) -> None:
        """Answer a request for a file."""
        key = self.path.removeprefix("/data/")
        fault = self.gdc.begin(key, self.headers)
        if fault and self._fail(fault):
            return None
        if key not in self.gdc.contents:
            return self._refuse(404, f"{key} not found")
        if key in self.gdc.controlled and self.headers.get("x-auth-token") != "granted":
            return self._refuse(403, "Your token is invalid or expired")
        self.gdc.count_transfer(1)
        try:
            self.gdc.meeting.wait(10)
            self._content(key, self.gdc.contents[key], fault.kind if fault else "")
        finally:
            self.gdc.count_transfer(-1)

    def _fail(self, fault: Fault) -> bool:
        """Let the request fail, unless the fault concerns the file's bytes."""
        if fault.kind == "hang":
            self.gdc.closing.wait(60)
        if fault.kind in ("hang", "drop"):
            self.close_connection = True
            return True
        if fault.kind == "html":
            self._send(200, b"<html>Down for maintenance</html>", {"Content-Type": "text/html; charset=utf-8"})
            return True
        if fault.kind.isdigit():
            self._send(int(fault.kind), b"{}", dict(fault.headers))
        return fault.kind.isdigit()

    def _content(self, key: str, content: bytes, fault: str) -> None:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if fault == "short":
            content = content[:-1]
        if fault == "wrong":
            content = bytes([content[0] ^ 1]) + content[1:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        status, total = 200, len(content)
        if asked and not self.gdc.ignores_ranges:
            first, last = int(asked[1]), min(int(asked[2] or total), total - 1)
            if first >= total:
                return self._refuse(416, "range not satisfiable")
            status, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first + (fault == 'shifted')}-{last}/{total}"
        if fault in ("chunked", "endless"):
            self.close_connection = True
            return self._send(status, content + b"more" * (fault == "endless"), headers, key, sized=False)
        if fault in ("cut", "stall"):
            self._send(status, content[: len(content) // 2], {**headers, "Content-Length": str(len(content))}, key)
            self.close_connection = True
            return self.gdc.closing.wait(60) if fault == "stall" else None
        return self._send(status, content, headers, key)

    def _refuse(self, status: int, message: str) -> None:
        self._json(status, {"error": message})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], key: str = "", *, sized: bool = True) -> None:
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if sized else {}
        for name, value in (length | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), _BLOCK):
            block = body[start : start + _BLOCK]
            self.wfile.write(block)
            with self.gdc.lock:
                self.gdc.bytes_sent[key] += len(block)


def _matches(record: dict[str, Any], term: dict[str, Any]) -> bool:
    """Whether a record has what a filter of the API asks for."""
    content = term["content"]
    if term["op"] in ("and", "or"):
        return (all if term["op"] == "and" else any)(_matches(record, part) for part in content)
    value = content["value"] if isinstance(content["value"], list) else [content["value"]]
    if term["op"] not in ("in", "="):
        raise KeyError(term["op"])
    return bool(set(_values(record, content["field"].removeprefix("files.").split("."))) & set(value))


def _values(place: Any, path: list[str]) -> list[Any]:
    """Everything at the end of a path that may lead through lists."""
    if isinstance(place, list):
        return [value for item in place for value in _values(item, path)]
    if not path:
        return [place]
    return _values(place[path[0]], path[1:]) if path[0] in place else []
