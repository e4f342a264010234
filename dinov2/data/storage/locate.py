"""From the name of a dataset to its storage."""

import os
import re
from urllib.parse import unquote

from dinov2.data.storage.base import PARQUET, FileType, LocalStorage, Storage
from dinov2.data.storage.fsspec import COMMIT, HubStorage, ObjectStorage
from dinov2.data.storage.retry import OUTAGE_S, Retries

_ID = r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
_HUB_URL = re.compile(rf"hf://datasets/{_ID}(?:/(?P<path>.*))?")
_BARE_ID = re.compile(_ID)
# A misspelt path looks like an id, so that a hub that is out of reach is soon given up.
_ASKED_FOR_A_PATH = {"connect_s": 3.0, "read_s": 10.0}
_OUTAGE_FOR_A_PATH_S = 3.0
NAMES = "folder (with subfolders), glob, braces {00..99} or file; org/name[@revision] on the Hugging Face hub; s3://..."


def open_storage(
    dataset: str, revision: str = "", outage_s: float = OUTAGE_S, train_only: bool = False, files: FileType = PARQUET
) -> Storage:
    """Find the storage of a dataset; what is on the hub is pinned to a commit, named by the storage's `location`.

    FileNotFoundError, PermissionError or RemoteError if there is no such dataset, it may not be read, or no answer;
    ValueError if the name or the revision makes no sense; ImportError if the package for a scheme is not installed.

    Args:
        dataset: a local folder, glob or file, which wins over a hub id; org/name or
            hf://datasets/org/name[@revision][/folder, glob or file] on the Hugging Face hub; or an fsspec URL
            (s3://, gs://, https://, ...).
        revision: branch, tag or commit of a hub dataset. A full commit wins over a revision in `dataset`.
        outage_s: seconds that its server may fail to answer.
        train_only: whether of a folder only the training split is taken, as it always is of a whole hub dataset.
        files: the type of the files that it consists of.
    """
    policy = Retries(outage_s)
    scheme, separator, path = dataset.partition("://") if "://" in dataset else ("", "", dataset)
    named = None
    if scheme == "hf":
        named = _HUB_URL.fullmatch(dataset)
        if not named:
            form = "hf://datasets/org/name[@revision][/folder, glob or file]"
            raise ValueError(f"dataset '{dataset}' is unknown; {form} is expected")
    elif not separator and not os.path.exists(path) and not files.fits(path):
        named = _BARE_ID.fullmatch(path)
    if not named:
        remote = separator and scheme != "file"
        if remote and not path.strip("/"):
            raise ValueError(f"dataset '{dataset}' names no location; a folder, glob or file is expected after ://")
        storage = ObjectStorage(dataset, policy, train_only, files) if remote else LocalStorage(path, train_only, files)
        if revision:
            advice = "leave it empty or name a Hugging Face dataset"
            raise ValueError(f"dataset '{dataset}' has no revisions, so '{revision}' cannot be taken; {advice}")
        return storage
    own = unquote(named["revision"] or "")
    if own and revision and own != revision and not COMMIT.fullmatch(revision):
        raise ValueError(f"dataset '{dataset}' and revision '{revision}' disagree; give one revision")
    revision = revision or own
    if separator:
        return HubStorage(named["repo"], revision, named["path"] or "", policy, files)
    try:
        # Beside the folder that it would lie in, it is all the more so: no second attempt.
        patience = 0.0 if os.path.isdir(os.path.dirname(path)) else _OUTAGE_FOR_A_PATH_S
        soon = Retries(min(outage_s, patience), **_ASKED_FOR_A_PATH)
        found = HubStorage(named["repo"], revision, "", soon, files)
    except (OSError, ValueError) as error:
        raise type(error)(f"there is no local path '{dataset}', and {error}") from error
    return HubStorage(named["repo"], found.commit, "", policy, files)
