"""Sidecars: Arrow files that keep the index of a dataset between the launches of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from dinov2.utils.files import replacing

logger = logging.getLogger(__name__)


def load_sidecar(sidecar: Path, schema: pa.Schema, format_: Mapping[bytes, bytes]) -> pa.Table | None:
    """Read an index; None where there is none, or one of another format, which its metadata tell."""
    try:
        with pa.OSFile(str(sidecar)) as file:
            index = pa.ipc.open_file(file).read_all()
        index.validate(full=True)
    except (pa.ArrowException, OSError):
        return None
    known = index.schema.equals(schema) and format_.items() <= (index.schema.metadata or {}).items()
    return index if known else None


def write_sidecar(sidecar: Path, index: pa.Table) -> None:
    """Keep an index for the next start; where that cannot be done, it is only logged."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with replacing(sidecar) as partial, pa.ipc.new_file(str(partial), index.schema, options=options) as file:
            file.write_table(index)
    except OSError as error:
        logger.warning("the index of the dataset is not kept for the next start (%s)", error)
