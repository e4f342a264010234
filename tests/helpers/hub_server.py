"""A stand-in for the Hugging Face hub: information, file tree, and file contents by ranges, of datasets and models.

Repositories can be made and committed to, with all files in the commit itself (no large-file storage).

with HubServer() as hub:
    hub.push("org/tiles", folder)
    hub.faults = seeded_faults(0, {"503": 0.1, "cut": 0.05})
    subprocess.run(command, env=os.environ | hub.environment())
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

_API = re.compile(
    r"/api/(?:datasets|models)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rev>[^/]+)(?P<path>/.*)?)?"
)
_WRITE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>branch|preupload|paths-info|commit)/(?P<rev>[^/]+)")
_FILE = re.compile(r"/(?:(?P<what>datasets|cdn)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


class Fault(NamedTuple):
    """What goes wrong with one request: a status with headers, or "hang", "cut" (half a body) or "drop"."""

    kind: str
    headers: tuple[tuple[str, str], ...] = ()


RATE_LIMITED = Fault("429", (("RateLimit", '"resolvers";r=0;t=1'),))
RETRY_AFTER = Fault("429", (("Retry-After", "1"),))


def seeded_faults(seed: int, fractions: dict[str | Fault, float]) -> Iterator[Fault | None]:
    """An endless schedule in which each fault has its fraction of the requests."""
    generator = random.Random(seed)
    kinds = [fault if isinstance(fault, Fault) else Fault(fault) for fault in fractions]
    while True:
        yield generator.choices([*kinds, None], [*fractions.values(), 1 - sum(fractions.values())])[0]


class HubServer:
    """Serves folders as datasets on 127.0.0.1; a context manager.

    Attributes:
        url: The endpoint.
        faults: Consumed by one item per request; None is no fault, and so is the end.
        requests: How many came, by kind: "info", "tree", "resolve", "cdn".
        tokens: Token by private dataset; other datasets are public.
        gated: Datasets whose files need a token, though their information does not.
        tokens_seen: What came as bearer tokens.
        writers: Tokens that may write.
        private: Repositories that are private, of those made here.
        page: Entries of the tree per answer.
        ignores_ranges: Whether whole files are sent whatever is asked for.
    """

    def __init__(self, page: int = 1000) -> None:
        self.faults: Iterable[Fault | None] = ()
        self.requests: Counter[str] = Counter()
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.tokens_seen: set[str] = set()
        self.writers: set[str] = set()
        self.private: set[str] = set()
        self.page, self.ignores_ranges = page, False
        self._commits: dict[tuple[str, str], Path] = {}  # dataset and commit: folder
        self._branches: dict[tuple[str, str], str] = {}  # dataset and revision: commit
        self._made = tempfile.TemporaryDirectory()  # what was committed here
        self._lock, self.closing = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that leave
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._made.cleanup()

    def environment(self) -> dict[str, str]:
        """What a process needs in order to come here, without a token."""
        address = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        return {**address, "HF_TOKEN": "", "HF_TOKEN_PATH": os.devnull}

    def push(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Make a folder the content of a revision and return the commit; older commits stay."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listing = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
        commit = hashlib.sha1(json.dumps([repo, revision, str(folder), listing]).encode()).hexdigest()
        self._commits[repo, commit], self._branches[repo, revision] = folder, commit
        return commit

    def commit(self, repo: str, revision: str, parent: str | None, files: dict[str, bytes]) -> str:
        """Put files over those of a parent commit, and return the new one."""
        folder = Path(tempfile.mkdtemp(dir=self._made.name))
        if before := self._commits.get((repo, parent)):
            shutil.copytree(before, folder, dirs_exist_ok=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return self.push(repo, folder, revision)

    def branch(self, repo: str, name: str) -> bool:
        """Begin a branch at the head of main; False where it is there."""
        is_new = (repo, name) not in self._branches
        self._branches.setdefault((repo, name), self._branches[repo, "main"])
        return is_new

    def find(self, repo: str, revision: str | None) -> tuple[str, Path] | None:
        """Commit and folder of a revision, if there is one."""
        commit = self._branches.get((repo, revision or "main"), revision)
        folder = self._commits.get((repo, commit))
        return (commit, folder) if folder else None

    def knows(self, repo: str) -> bool:
        """Whether there is such a dataset."""
        return any(name == repo for name, _ in self._commits)

    def begin(self, kind: str, token: str) -> Fault | None:
        """Count a request and draw its fault."""
        with self._lock:
            self.requests[kind] += 1
            self.tokens_seen |= {token} - {""}
            self.faults = iter(self.faults)
            return next(self.faults, None)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        """Answer as the hub does."""
        address = urlsplit(self.path)
        found = _API.fullmatch(address.path) or _FILE.fullmatch(address.path)
        if not found:
            return self._error(404, "", "Not found")
        what = {"datasets": "resolve", "cdn": "cdn", "tree": "tree"}.get(found["what"], "info")
        what = "resolve" if found.re is _FILE and not found["what"] else what
        repo, path = found["repo"], unquote(found["path"] or "").strip("/")
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        fault = self.hub.begin(what, token)
        if fault and self._fail(fault):
            return None
        refused = self._refused(repo, what, token)
        if refused:
            return self._error(*refused)
        revision = unquote(found["rev"]) if found["rev"] else None
        place = self.hub.find(repo, revision)
        if not place:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = place
        if what == "info":
            files = [{"rfilename": str(item.relative_to(folder))} for item in folder.rglob("*") if item.is_file()]
            return self._json({"id": repo, "sha": commit, "siblings": files, "private": repo in self.hub.private})
        if what == "tree":
            return self._tree(folder, path, parse_qs(address.query), address.path)
        if not (folder / path).is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        if what == "resolve" and path.endswith(".parquet"):
            target = f"/cdn/{repo}/resolve/{commit}/{quote(path)}?Signature=secret"
            return self._send(302, b"", {"Location": target, "X-Repo-Commit": commit})
        return self._content((folder / path).read_bytes(), fault, {"X-Repo-Commit": commit})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Make repositories and branches, tell of paths, and commit, as the hub does."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        address, hub = urlsplit(self.path).path, self.hub
        if address == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        found = _WRITE.fullmatch(address)
        if not found and address != "/api/repos/create":
            return self._error(404, "", "Not found")
        if (fault := hub.begin(found["what"] if found else "create", token)) and self._fail(fault):
            return None
        if token not in hub.writers:
            return self._error(403 if token else 401, "", "You have no right to write here.")
        if not found:
            return self._create(json.loads(body))
        repo, revision = found["repo"], unquote(found["rev"])
        if found["what"] == "branch":
            return self._json({}) if hub.branch(repo, revision) else self._error(409, "", "Reference exists")
        place = hub.find(repo, revision)
        if not place:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = place
        if found["what"] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            told = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._json({"files": told})
        if found["what"] == "paths-info":
            names = [folder / name for name in parse_qs(body.decode()).get("paths", [])]
            return self._json([_entry(path, folder) for path in names if path.exists()])
        header, *files = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", commit) != commit:
            return self._error(412, "", "A commit has happened since.")
        contents = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
        commit = hub.commit(repo, revision, commit, contents)
        return self._json(
            {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}
        )

    def _create(self, told: dict[str, Any]) -> None:
        repo = f"{told['organization']}/{told['name']}"
        if self.hub.knows(repo):
            return self._error(409, "", "You already created this model repo")
        self.hub.private |= {repo} if told.get("visibility") == "private" else set()
        self.hub.commit(repo, "main", None, {".gitattributes": b"*.pth filter=lfs\n"})
        return self._json({"url": f"{self.hub.url}/{repo}", "id": repo})

    def _refused(self, repo: str, what: str, token: str) -> tuple[int, str, str] | None:
        hub, wrong = self.hub, "Invalid username or password."
        if what == "cdn":  # its links are signed
            return None
        if not hub.knows(repo) or hub.tokens.get(repo, token) != token:
            return (404, "RepoNotFound", "Repository not found") if token else (401, "RepoNotFound", wrong)
        if repo in hub.gated and what != "info" and token != "granted":
            return (403 if token else 401), "GatedRepo", f"Access to dataset {repo} is restricted."
        return None

    def _fail(self, fault: Fault) -> bool:
        """Let the request fail, unless the fault concerns the body."""
        if fault.kind == "hang":
            self.hub.closing.wait(60)
        if fault.kind in ("hang", "drop"):
            self.close_connection = True
        elif fault.kind.isdigit():
            self._send(int(fault.kind), b"no", dict(fault.headers))
        return fault.kind != "cut"

    def _tree(self, folder: Path, path: str, query: dict[str, list[str]], route: str) -> None:
        if not (folder / path).is_dir():
            return self._error(404, "EntryNotFound", f"{path} does not exist on 'main'")
        inside = (folder / path).rglob("*") if query.get("recursive") == ["true"] else (folder / path).iterdir()
        entries = [_entry(item, folder) for item in sorted(inside)]
        start = int(query.get("cursor", ["0"])[0])
        end, headers = start + self.hub.page, {}
        if end < len(entries):
            headers = {"Link": f'<{self.hub.url}{route}?recursive=true&cursor={end}>; rel="next"'}
        return self._json(entries[start:end], headers)

    def _content(self, content: bytes, fault: Fault | None, more: dict[str, str]) -> None:
        headers = {**more, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        status, total = 200, len(content)
        if asked and not self.hub.ignores_ranges:
            first, last = int(asked[1]), min(int(asked[2] or total), total - 1)
            if first >= total:
                return self._error(416, "", "Range not satisfiable")
            status, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        return self._send(status, content, headers, len(content) // 2 if fault else None)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = self.close_connection or cut is not None


def _entry(item: Path, folder: Path) -> dict[str, Any]:
    name = item.relative_to(folder).as_posix()
    content = item.read_bytes() if item.is_file() else name.encode()
    digest = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {
        "type": "file" if item.is_file() else "directory",
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),  # git's own
        "path": name,
    }
    size = item.stat().st_size if item.is_file() else 0
    if name.endswith(".parquet"):
        entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
    return {**entry, "size": size}
