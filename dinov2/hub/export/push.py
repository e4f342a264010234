"""An export on the Hugging Face hub: all of its files in one commit, none of the repository's replaced unasked."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2.utils.secrets import hide


def push(
    folder: Path, names: Sequence[str], repo: str, *, private: bool = False, revision: str = "", replace: bool = False
) -> str:
    """Upload files of a folder to the model repository ``org/name``, made where there is none; returns its address.

    The token is the one that huggingface_hub finds (``HF_TOKEN``, or that of ``hf auth login``). Files that are there
    already with the same contents are not sent again.

    Args:
        folder, names: the files, whose names are those in the repository, too.
        repo: ``org/name``.
        private: make the repository a private one.
        revision: branch, made from the default one where there is none; empty: the default one.
        replace: whether files of the repository with other contents may be replaced.

    Raises:
        FileExistsError: if one of them is there with other contents and is not to be replaced.
        ValueError: if the repository is public, but is to be private.
        OSError: if the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi, get_token

    hide(get_token() or "")
    api, place = HfApi(endpoint=os.environ.get("HF_ENDPOINT")), f"'{repo}' on the Hugging Face hub"
    try:
        is_refused = not _is_ready(api, repo, private, revision)
        differing = [] if is_refused else _upload(api, folder, names, repo, revision or "main", replace)
    except Exception as error:  # of the hub's library, or of the HTTP library that it uses
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"{place} does not take the files ({reason}); they are in '{folder}'. HF_TOKEN, or hf auth login, has to "
            "give a token that may write there."
        ) from error
    if is_refused:
        raise ValueError(f"{place} is public; leave out --private, or make it private there first.")
    if differing:
        raise FileExistsError(
            f"{place} has {', '.join(differing)} with other contents; --replace replaces them, another name or "
            "--revision keeps them."
        )
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def _is_ready(api: Any, repo: str, private: bool, revision: str) -> bool:
    """Make the repository and the branch where there are none; False where it is public and is not to be."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_public = api.model_info(repo).private is False
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
        is_public = False
    if private and is_public:
        return False
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    return True


def _upload(api: Any, folder: Path, names: Sequence[str], repo: str, branch: str, replace: bool) -> list[str]:
    """Commit what the branch lacks or may get anew; returns what differs and may not, and then nothing is sent."""
    from huggingface_hub import CommitOperationAdd

    commit = api.model_info(repo, revision=branch).sha
    found = {entry.path: entry for entry in api.get_paths_info(repo, list(names), revision=commit)}
    new = [name for name in names if name not in found or not _is_same(folder / name, found[name])]
    differing = [name for name in new if name in found]
    if new and (replace or not differing):
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in new]
        told = {"commit_message": f"Export {', '.join(new)}", "revision": branch, "parent_commit": commit}
        api.create_commit(repo, operations=operations, **told)
        return []
    return differing


def _is_same(path: Path, entry: Any) -> bool:
    """Whether a file's contents are those of the hub's: by SHA-256 where it is stored apart, else by git's own hash."""
    size = path.stat().st_size
    if entry.size != size:
        return False
    with path.open("rb") as file:
        if entry.lfs is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % size + file.read()).hexdigest() == entry.blob_id
