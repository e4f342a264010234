"""Files over a network: behind any fsspec URL (object stores, web servers), and on the Hugging Face hub.

The hub is asked directly, not through `HfFileSystem`. A read is one request either way, but there each process first
asks for the commit and for the listing of each folder, and failed requests are repeated by rules of its own, with
pauses that can neither be interrupted nor shared between processes.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from glob import has_magic
from typing import Any, TypeVar
from urllib.parse import quote

from dinov2.data.storage.base import PARQUET, FileType, StoredFile, no_files, public_name, train_names
from dinov2.data.storage.patterns import expand_braces, fixed_folder, has_braces, has_pattern
from dinov2.data.storage.retry import RemoteError, Retries, answer, reason
from dinov2.data.storage.train_split import CARD
from dinov2.utils.provenance import how_to_install

_VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "crc32c", "checksum")
_VERSION_KEYS += ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")
COMMIT = re.compile(r"[0-9a-f]{40}")
_CONNECTIONS, _LISTING_THREADS = 64, 16  # of one process; botocore's own 10 connections would make readers wait
_FLAT = ("s3:", "s3a:", "gs:", "gcs:", "abfs:", "az:")  # stores that list a folder with its subfolders at once
_Result = TypeVar("_Result")


class RemoteStorage:
    """A `Storage` over a network; subclasses list and locate files, and have `_get_range` and `_explain`."""

    location: str
    _retries: Retries

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes of a file, by one request."""
        url = self.locate(name)

        def request() -> bytes:
            data = self._get_range(name, start, length)
            if data is None or len(data) > length:
                asked = f"'{url}' was asked for bytes {start} to {start + length - 1} and gave others"
                raise RemoteError(f"{asked}; use a server that supports ranges, or a local copy")
            if len(data) < length:
                raise ConnectionError(f"{len(data)} of {length} bytes came")
            return data

        return self._ask(url, request, url) if length else b""

    def _ask(self, url: str, request: Callable[[], _Result], wanted: str) -> _Result:
        """Send a request, repeated as `Retries` says, and tell in a sentence why ``wanted`` cannot be had."""
        try:
            return self._retries.call(url, request)
        except RemoteError:
            raise
        except Exception as error:
            explained = self._explain(error, wanted, *answer(error))
            if explained is None:
                raise
            raise explained from error


class ObjectStorage(RemoteStorage):
    """The files of a type in a folder (with its subfolders), of a glob or braces, or one file of it.

    With ``train_only`` a folder's are those of its training split, as `find_train_files` tells them.
    Endpoints and credentials are those of the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).
    ValueError if the scheme of the URL is unknown, ImportError if the package for it is not installed.
    """

    def __init__(self, url: str, retries: Retries, train_only: bool = False, files: FileType = PARQUET) -> None:
        self._url, self._retries, self._files = url.rstrip("/"), retries, files
        self._folder = _folder_of(self._url, files)
        self._train_only = train_only and self._folder == self._url
        self.location = public_name(self._url)
        self._filesystem()

    def list_files(self) -> list[StoredFile]:
        """List files by name; see `Storage`."""
        fs, folder = self._filesystem()
        pattern = folder + self._url[len(self._folder) :]
        fs.invalidate_cache()
        found = self._ask(self.location, partial(self._find, fs, folder, pattern), self.location)
        inside = len(folder.rstrip("/")) + 1
        names = {path[inside:]: found[path] for path in _select(found, self._files, pattern, inside)}
        if self._train_only:
            stored = found.get(f"{folder.rstrip('/')}/{CARD}")
            size = self._describe(CARD, stored).size if stored else 0
            card = self.read_range(CARD, 0, size).decode(errors="replace")
            chosen = train_names(self.location, list(names), card, self._files)
            names = {name: info for name, info in names.items() if name in chosen}
        if not names:
            raise no_files(self.location, self._files)
        return self._described(names)

    def describe(self, names: Sequence[str]) -> list[StoredFile]:
        """Files by their names, each asked for, where no folder can be listed; FileNotFoundError if one is missing."""
        return self._described({name: {} for name in names})

    def _described(self, names: Mapping[str, dict[str, Any]]) -> list[StoredFile]:
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            return list(pool.map(self._describe, names, names.values()))

    def locate(self, name: str) -> str:
        """Return the URL of a file."""
        return public_name(f"{self._folder}/{name}")

    def _filesystem(self) -> tuple[Any, str]:
        return filesystem(self._folder, self._retries)

    def _find(self, fs: Any, folder: str, pattern: str) -> dict[str, dict[str, Any]]:
        """Files at and below a folder, by path."""
        if self._files.fits(pattern) and not has_magic(pattern):
            if has_braces(pattern):  # as many names as it says, which `_describe` asks for one by one
                return {path: {"type": "file"} for path in expand_braces(pattern)}
            info = fs.info(pattern)
            if info["type"] == "file":
                return {pattern: info}
        if self._url.startswith(_FLAT):
            found = fs.find(folder, detail=True)
        else:  # `find` would go through the folders one by one, and leave out those that cannot be read
            walk = fs.walk(folder, detail=True, on_error="raise")
            found = {info["name"]: info for _, _, files in walk for info in files.values()}
        return {path: info for path, info in found.items() if info["type"] == "file"}

    def _describe(self, name: str, info: dict[str, Any]) -> StoredFile:
        """A file with its size and version, asked for where the listing had none (web servers)."""
        url = self.locate(name)
        if info.get("size") is None:
            fs, folder = self._filesystem()
            info = self._ask(url, partial(fs.info, f"{folder}/{name}"), url)
        if info.get("size") is None:
            raise RemoteError(f"the server does not tell the size of '{url}'; use another, or a local copy")
        return StoredFile(name, info["size"], version_of(info))

    def _get_range(self, name: str, start: int, length: int) -> bytes:
        fs, folder = self._filesystem()
        return fs.cat_file(f"{folder}/{name}", start=start, end=start + length)

    def _explain(self, error: Exception, url: str, status: int | None, headers: Mapping[str, str]) -> Exception:
        missing = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
        if missing or status in (401, 403) or isinstance(error, PermissionError):
            advice = "check the credentials in the environment (for a public S3 bucket set FSSPEC_S3_ANON=true)"
            return PermissionError(f"'{url}' may not be read ({reason(error)}); {advice}")
        if status == 404 or isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"'{url}' does not exist; check the name")
        return RemoteError(f"'{url}' cannot be read ({reason(error)})")


class HubStorage(RemoteStorage):
    """Files of one commit on the Hugging Face hub, or on a server that speaks its protocol.

    The server is `HF_ENDPOINT` and the token that of `HF_TOKEN` or `hf auth login`, both as they are at use; neither
    token nor connection is kept. An empty revision is the default branch, an empty path the training split. The
    revision is resolved here, once, to ``commit``; a full commit needs no request. FileNotFoundError or PermissionError
    if there is no such dataset or it may not be read, ValueError without the revision, RemoteError without an answer.
    """

    def __init__(self, repo: str, revision: str, path: str, retries: Retries, files: FileType = PARQUET) -> None:
        self._repo, self._path, self._retries, self._files = repo, path.strip("/"), retries, files
        self._folder, self._revision = _folder_of(self._path, files), revision
        self._timeout = (retries.connect_s, *[retries.read_s] * 3)  # to connect, read, write, and queue
        self.commit = revision
        if not COMMIT.fullmatch(revision):
            from huggingface_hub import HfApi

            asked = {"revision": revision or None, "timeout": self._timeout}
            request = partial(HfApi(endpoint=_endpoint()).dataset_info, repo, **asked)
            self.commit = self._ask(f"{_endpoint()}/api/datasets/{repo}", request, "answer").sha
        self.location = f"hf://datasets/{repo}@{self.commit}" + (f"/{self._path}" if self._path else "")

    def list_files(self) -> list[StoredFile]:
        """List files of the commit by name; see `Storage`."""
        tree = {file.path: file for file in self._tree()}
        shards = _select(tree, self._files, self._path)
        if not self._path:
            card = self.read_range(CARD, 0, tree[CARD].size if CARD in tree else 0).decode(errors="replace")
            shards = train_names(f"hf://datasets/{self._repo}", shards, card, self._files)
        if not shards:
            raise no_files(self.location, self._files)
        inside = len(self._folder) + 1 if self._folder else 0
        files = (tree[name] for name in sorted(shards))
        return [StoredFile(f.path[inside:], f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files]

    def locate(self, name: str) -> str:
        """Return the ``hf://`` URL of a file."""
        from huggingface_hub import hf_hub_url

        path = f"{self._folder}/{name}" if self._folder else name
        return hf_hub_url(self._repo, path, repo_type="dataset", revision=self.commit, endpoint=_endpoint())

    def _tree(self) -> Iterator[Any]:
        """All files below the folder. Not by `list_repo_tree`: that waits for an answer without end."""
        from huggingface_hub.hf_api import RepoFile

        def request() -> tuple[list[dict[str, Any]], str | None]:
            with self._get(page) as response:
                response.read()
                return response.json(), response.links.get("next", {}).get("url")

        url = f"{_endpoint()}/api/datasets/{self._repo}/tree/{self.commit}"
        page = f"{url}/{quote(self._folder)}?recursive=true" if self._folder else f"{url}?recursive=true"
        while page:
            entries, page = self._ask(url, request, f"folder '{self._folder}'")
            yield from (RepoFile(**entry) for entry in entries if entry["type"] == "file")

    def _get_range(self, name: str, start: int, length: int) -> bytes | None:
        # Compressed bytes of a range are no bytes of the file.
        headers = {"range": f"bytes={start}-{start + length - 1}", "accept-encoding": "identity"}
        with self._get(self.locate(name), headers) as response:
            is_all = start == 0 and response.headers.get("content-length") == str(length)
            is_range = response.headers.get("content-range", "").startswith(f"bytes {start}-")
            given = is_range if response.status_code == 206 else is_all
            return response.read() if given else None  # else perhaps the whole file

    @contextmanager
    def _get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Any]:
        from huggingface_hub.utils import build_hf_headers, get_session

        request = {"headers": build_hf_headers(headers=headers), "timeout": self._timeout, "follow_redirects": True}
        with get_session().stream("GET", url, **request) as response:
            response.raise_for_status()
            yield response

    def _explain(self, error: Exception, wanted: str, status: int | None, headers: dict[str, str]) -> Exception | None:
        """Say what an answer of the hub means, which is 401 or 404 for what it does not want to speak of."""
        from huggingface_hub import get_token

        if status is None and isinstance(error, OSError | ValueError):
            return None
        dataset, code = f"dataset '{self._repo}'", headers.get("x-error-code")
        token = "the token in use may not read it" if get_token() else "no token is set"
        if code == "RevisionNotFound":
            known = f"{dataset} on {_endpoint()} has no revision '{self._revision}'"
            return ValueError(f"{known}; a branch, a tag or a commit is expected")
        if code == "EntryNotFound":
            return FileNotFoundError(f"{dataset} on {_endpoint()} has no {wanted} at commit {self.commit}")
        if code == "GatedRepo" or status == 403:
            advice = "ask for access on its page, then set HF_TOKEN or run `hf auth login`"
            return PermissionError(f"{dataset} on {_endpoint()} is private or gated and {token}; {advice}")
        if status in (401, 404):
            advice = "check the name, set HF_TOKEN or run `hf auth login`"
            return FileNotFoundError(f"{_endpoint()} has no {dataset}, or it is private and {token}; {advice}")
        return RemoteError(f"{dataset} on {_endpoint()}: {wanted} gave {reason(error)}")


def version_of(info: Mapping[str, Any]) -> str:
    """Version of a file, from what fsspec says of it; empty where nothing tells it."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _folder_of(path: str, files: FileType) -> str:
    """The folder that names are relative to: the path itself, or what stands before a glob or a file."""
    parts = (fixed_folder(path) if has_pattern(path) else path).split("/")
    ends = (i for i, part in enumerate(parts) if files.fits(part))
    return "/".join(parts[: next(ends, len(parts))])


def _select(paths: Iterable[str], files: FileType, pattern: str, inside: int = 0) -> list[str]:
    """Those files of a type, sorted, that are `pattern`, match it or lie in it, and are not hidden from `inside` on."""
    from fsspec.utils import glob_translate

    def accepted(one: str) -> str:
        folder = re.escape(one.rstrip("/")) + "(/.*)?"
        return glob_translate(one) if has_magic(one) else folder if one else ".*"

    shards = (path for path in paths if files.fits(path) and "/." not in f"/{path[inside:]}")
    if has_braces(pattern) and not has_magic(pattern):  # perhaps thousands, too many for an expression
        named = set(expand_braces(pattern))
        return sorted(path for path in shards if path in named)
    chosen = re.compile("|".join(f"(?:{accepted(one)})" for one in expand_braces(pattern)))
    return sorted(filter(chosen.fullmatch, shards))


def filesystem(url: str, retries: Retries) -> tuple[Any, str]:
    """The file system for a URL, and the URL's path in it, of this process and thread."""
    return _connect(os.getpid(), threading.get_ident(), url, retries.connect_s, retries.read_s)


@cache
def _connect(process: int, thread: int, url: str, connect_s: float, read_s: float) -> tuple[Any, str]:
    # Kept per process, since connections do not survive a fork. What a forked process inherits stays referenced
    # here, unused: if it were collected, its sockets would leave the event loop that the parent still waits on.
    # And kept per thread, since only the asynchronous ones, which fsspec shares between threads, are safe in several.
    from fsspec.core import url_to_fs

    scheme, options = url.partition("://")[0], {}
    is_s3 = scheme in ("s3", "s3a")
    if is_s3:
        timeouts = {"connect_timeout": connect_s, "read_timeout": read_s}
        once = {"mode": "standard", "total_max_attempts": 1}
        options["config_kwargs"] = timeouts | {"max_pool_connections": _CONNECTIONS, "retries": once}
    try:
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=connect_s, sock_read=read_s)
            # Compressed bytes of a range are no bytes of the file.
            options["client_kwargs"] = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        advice = how_to_install("s3") if is_s3 else str(error)
        raise ImportError(f"a package for {scheme}:// is not installed: {advice}") from error
    except ValueError as error:
        raise ValueError(f"dataset '{public_name(url)}' cannot be opened ({error})") from error
    if is_s3:
        fs.retries = 1
    return fs, path
