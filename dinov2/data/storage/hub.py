"""Parquet files of a dataset on the Hugging Face hub, or on a server that speaks its protocol."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import has_magic
from typing import Any
from urllib.parse import quote

from dinov2.data.storage.base import StoredFile, folder_of, is_hidden
from dinov2.data.storage.retry import Refusal, RemoteError, Retries, answer, reason
from dinov2.data.storage.train_split import find_train_files

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARD = "README.md"


class HubStorage:
    """Files of one commit; only the repository, the commit and the path are kept, neither token nor connection.

    The server is `HF_ENDPOINT` and the token that of `HF_TOKEN` or `hf auth login`, both as they are at use.

    Attributes:
        commit: That commit.

    Args:
        repo: org/name.
        revision: Branch, tag or commit; the default branch if empty. It is resolved here, once; a full commit
            needs no request.
        path: Folder (with its subfolders), glob or .parquet file; the training split if empty.
        retries: How long requests are repeated.

    Raises:
        FileNotFoundError: If there is no such dataset, or it is hidden from this user.
        PermissionError: If it may not be read.
        ValueError: If there is no such revision.
        RemoteError: If the hub does not answer.
    """

    def __init__(self, repo: str, revision: str, path: str, retries: Retries) -> None:
        self._repo, self._path, self._retries = repo, path.strip("/"), retries
        self._folder, self._revision = folder_of(self._path), revision
        self._timeout = (retries.connect_s, *[retries.read_s] * 3)  # to connect, read, write, and queue
        self.commit = revision if _COMMIT.fullmatch(revision) else self._resolve(revision)
        self.place = f"hf://datasets/{repo}@{self.commit}" + (f"/{self._path}" if self._path else "")

    def list_files(self) -> list[StoredFile]:
        """List the Parquet files by name, sorted; FileNotFoundError if there is none."""
        from fsspec.utils import glob_translate

        tree = {file.path: file for file in self._tree()}
        shards = [name for name in tree if name.endswith(".parquet") and not is_hidden(name)]
        if not self._path:
            shards = find_train_files(self._repo, shards, self._read_card(tree))
        elif has_magic(self._path):
            shards = [name for name in shards if re.match(glob_translate(self._path), name)]
        else:
            shards = [name for name in shards if f"{name}/".startswith(f"{self._path}/")]
        if not shards:
            raise FileNotFoundError(f"dataset '{self.place}' holds no Parquet file; at least one is expected")
        inside = len(self._folder) + 1 if self._folder else 0
        files = [tree[name] for name in sorted(shards)]
        return [
            StoredFile(file.path[inside:], file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in files
        ]

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes of a file by one request; OSError where they cannot be had."""
        if not length:
            return b""
        url = self.locate(name)
        with self._in_plain_words(url):
            return self._retries.call(url, partial(self._get_range, url, start, length))

    def locate(self, name: str) -> str:
        """Give the URL of a file."""
        from huggingface_hub import hf_hub_url

        path = f"{self._folder}/{name}" if self._folder else name
        return hf_hub_url(self._repo, path, repo_type="dataset", revision=self.commit, endpoint=_endpoint())

    def _resolve(self, revision: str) -> str:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint())
        request = partial(api.dataset_info, self._repo, revision=revision or None, timeout=self._timeout)
        with self._in_plain_words("answer"):
            return self._retries.call(f"{_endpoint()}/api/datasets/{self._repo}", request).sha

    def _tree(self) -> Iterator[Any]:
        """All files below the folder. Not by `list_repo_tree`: that waits for an answer without end."""
        from huggingface_hub.hf_api import RepoFile

        url = f"{_endpoint()}/api/datasets/{self._repo}/tree/{self.commit}"
        page = f"{url}/{quote(self._folder)}?recursive=true" if self._folder else f"{url}?recursive=true"
        with self._in_plain_words(f"folder '{self._folder}'"):
            while page:
                entries, page = self._retries.call(url, partial(self._get_page, page))
                yield from (RepoFile(**entry) for entry in entries if entry["type"] == "file")

    def _get_page(self, url: str) -> tuple[list[dict[str, Any]], str | None]:
        from huggingface_hub.utils import build_hf_headers, get_session

        request = {"headers": build_hf_headers(), "timeout": self._timeout, "follow_redirects": True}
        response = get_session().get(url, **request)
        if response.status_code != 200:
            raise Refusal(response.status_code, response.headers)
        return response.json(), response.links.get("next", {}).get("url")

    def _get_range(self, url: str, start: int, length: int) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session

        wanted = {"range": f"bytes={start}-{start + length - 1}", "accept-encoding": "identity"}
        request = {"headers": build_hf_headers(headers=wanted), "timeout": self._timeout}
        with get_session().stream("GET", url, follow_redirects=True, **request) as response:
            if response.status_code not in (200, 206):
                raise Refusal(response.status_code, response.headers)
            is_all = start == 0 and response.headers.get("content-length") == str(length)
            is_range = response.headers.get("content-range", "").startswith(f"bytes {start}-")
            if not (is_range if response.status_code == 206 else is_all):
                raise RemoteError(
                    f"'{url}' was asked for bytes {start} to {start + length - 1} and gave others; "
                    "use a server that supports ranges, or a local copy"
                )
            data = response.read()
        if len(data) != length:
            raise ConnectionError(f"{len(data)} of {length} bytes came")
        return data

    def _read_card(self, tree: dict[str, Any]) -> str:
        size = tree[_CARD].size if _CARD in tree else 0
        return self.read_range(_CARD, 0, size).decode(errors="replace")

    @contextmanager
    def _in_plain_words(self, wanted: str) -> Iterator[None]:
        """Say what an answer of the hub means, which is 401 or 404 for what it does not want to speak of."""
        from huggingface_hub import get_token

        try:
            yield
        except Exception as error:
            status, headers = answer(error)
            if isinstance(error, RemoteError) or (status is None and isinstance(error, OSError | ValueError)):
                raise
            dataset, code = f"dataset '{self._repo}'", headers.get("x-error-code")
            token = "the token in use may not read it" if get_token() else "no token is set"
            if code == "RevisionNotFound":
                message = f"{dataset} on {_endpoint()} has no revision '{self._revision}'"
                raise ValueError(f"{message}; a branch, a tag or a commit is expected") from error
            if code == "EntryNotFound":
                message = f"{dataset} on {_endpoint()} has no {wanted} at commit {self.commit}"
                raise FileNotFoundError(message) from error
            if code == "GatedRepo" or status == 403:
                message = f"{dataset} on {_endpoint()} is private or gated and {token}"
                advice = "ask for access on its page, then set HF_TOKEN or run `hf auth login`"
                raise PermissionError(f"{message}; {advice}") from error
            if status in (401, 404):
                message = f"{_endpoint()} has no {dataset}, or it is private and {token}"
                advice = "check the name, set HF_TOKEN or run `hf auth login`"
                raise FileNotFoundError(f"{message}; {advice}") from error
            raise RemoteError(f"{dataset} on {_endpoint()}: {wanted} gave {reason(error)}") from error


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
