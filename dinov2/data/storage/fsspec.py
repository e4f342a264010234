"""Parquet files behind any fsspec URL: object stores, web servers."""

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from glob import has_magic
from typing import Any

from dinov2.data.storage.base import StoredFile, folder_of, is_hidden
from dinov2.data.storage.retry import RemoteError, Retries, answer, reason

VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "crc32c", "checksum")
VERSION_KEYS += ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")
_CONNECTIONS = 64  # of one process to one store; botocore's own 10 would make reader threads wait
_LISTING_THREADS = 16
_FLAT = (
    "s3:",
    "s3a:",
    "gs:",
    "gcs:",
    "abfs:",
    "az:",
)  # stores that list a folder with its subfolders at once


class ObjectStorage:
    """The Parquet files of a folder (with its subfolders), of a glob, or one .parquet file; hidden ones are left out.

    Endpoints and credentials are those of the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...).

    Args:
        url: scheme://...
        retries: How long requests are repeated.

    Raises:
        ValueError: If the scheme is unknown.
        ImportError: If the package for it is not installed.
    """

    def __init__(self, url: str, retries: Retries) -> None:
        self._url, self._retries = url.rstrip("/"), retries
        self._folder = folder_of(self._url)
        self.place = _public(self._url)
        self._filesystem()

    def list_files(self) -> list[StoredFile]:
        """List the Parquet files by name, sorted; FileNotFoundError if there is none."""
        fs, folder = self._filesystem()
        with self._in_plain_words(self.place):
            fs.invalidate_cache()
            found = self._retries.call(self.place, partial(self._find, fs, folder))
        inside = len(folder.rstrip("/")) + 1
        files = {path[inside:]: info for path, info in found.items() if info["type"] == "file"}
        names = sorted(name for name in files if name.endswith(".parquet") and not is_hidden(name))
        if not names:
            raise FileNotFoundError(f"dataset '{self.place}' holds no Parquet file; at least one is expected")
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            return list(pool.map(lambda name: self._describe(name, files[name]), names))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes of a file by one request; OSError where they cannot be had."""
        if not length:
            return b""
        url = self.locate(name)
        with self._in_plain_words(url):
            return self._retries.call(url, partial(self._get_range, name, start, length))

    def locate(self, name: str) -> str:
        """Give the URL of a file, without credentials."""
        return _public(f"{self._folder}/{name}")

    def _filesystem(self) -> tuple[Any, str]:
        return connect(
            os.getpid(), threading.get_ident(), self._folder, self._retries.connect_s, self._retries.read_s
        )

    def _find(self, fs: Any, folder: str) -> dict[str, dict[str, Any]]:
        from fsspec.utils import glob_translate

        path = folder + self._url[len(self._folder) :]
        if path.endswith(".parquet") and not has_magic(path) and (info := fs.info(path))["type"] == "file":
            return {path: info}
        if self._url.startswith(_FLAT):
            found = fs.find(folder, detail=True)
        else:  # `find` would go through the folders one by one, and leave out those that cannot be read
            walk = fs.walk(folder, detail=True, on_error="raise")
            found = {info["name"]: info for _, _, files in walk for info in files.values()}
        if has_magic(path):
            return {name: found[name] for name in found if re.match(glob_translate(path), name)}
        return {name: found[name] for name in found if f"{name}/".startswith(f"{path.rstrip('/')}/")}

    def _describe(self, name: str, info: dict[str, Any]) -> StoredFile:
        """A file with its size and version, asked for where the listing had none (web servers)."""
        url = self.locate(name)
        if info.get("size") is None:
            fs, folder = self._filesystem()
            with self._in_plain_words(url):
                info = self._retries.call(url, partial(fs.info, f"{folder}/{name}"))
        if info.get("size") is None:
            raise RemoteError(f"the server does not tell the size of '{url}'; use another, or a local copy")
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key) is not None), "")
        return StoredFile(name, info["size"], version)

    def _get_range(self, name: str, start: int, length: int) -> bytes:
        fs, folder = self._filesystem()
        data = fs.cat_file(f"{folder}/{name}", start=start, end=start + length)
        if len(data) < length:
            raise ConnectionError(f"{len(data)} of {length} bytes came")
        if len(data) > length:
            raise RemoteError(
                f"'{self.locate(name)}' was asked for bytes {start} to {start + length - 1} and gave {len(data)}; "
                "use a server that supports ranges, or a local copy"
            )
        return data

    @contextmanager
    def _in_plain_words(self, url: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, RemoteError):
                raise
            status, _ = answer(error)
            missing = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
            if missing or status in (401, 403) or isinstance(error, PermissionError):
                message = f"'{url}' may not be read ({reason(error)})"
                advice = "check the credentials in the environment (for a public S3 bucket set FSSPEC_S3_ANON=true)"
                raise PermissionError(f"{message}; {advice}") from error
            if status == 404 or isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"'{url}' does not exist; check the name") from error
            raise RemoteError(f"'{url}' cannot be read ({reason(error)})") from error


@cache
def connect(process: int, thread: int, url: str, connect_s: float, read_s: float) -> tuple[Any, str]:
    """The file system for a URL, and the URL's path in it.

    Kept per process, since connections do not survive a fork. What a forked process inherits stays referenced
    here, unused: if it were collected, its sockets would leave the event loop that the parent still waits on.
    And kept per thread, since only the asynchronous ones, which fsspec shares between threads, are safe in several.
    """
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
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
        advice = 'pip install "path-fm[s3]"' if scheme in ("s3", "s3a") else str(error)
        raise ImportError(f"a package for {scheme}:// is not installed: {advice}") from error
    except ValueError as error:
        raise ValueError(f"dataset '{_public(url)}' cannot be opened ({error})") from error
    if scheme in ("s3", "s3a"):
        fs.retries = 1
    return fs, path


def _public(url: str) -> str:
    """A URL without user and password, and a web address without its query, since they may hold secrets."""
    url = re.sub(r"(?<=://)[^/@]*@", "", url)
    return url.partition("?")[0] if url.startswith("http") else url
