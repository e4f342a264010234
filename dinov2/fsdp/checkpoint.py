"""Save, find, load and retain sharded training checkpoints.

A checkpoint is a folder ``checkpoints/step_XXXXXXX`` holding one file of tensors per rank and ``state.json``. It
is written beside under a temporary name, brought to the disk and renamed when complete, so a folder with the final
name is whole; ``last_checkpoint`` names the newest. Tensors are addressed by name: any number of ranks can read them.
"""

import json
import logging
import pickle
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dinov2.distributed import MainProcessError, is_main_process, on_main_process
from dinov2.utils import files

logger = logging.getLogger("dinov2")

_STATE_FILE = "state.json"


class Checkpointer:
    """The checkpoints of the run in ``output_dir``, of which `save` keeps the ``keep`` newest complete ones."""

    def __init__(self, output_dir: Path, keep: int):
        self.output_dir, self.folder, self.keep = output_dir, output_dir / "checkpoints", keep
        # Without a process group torch warns that it assumes a single process, which here is so.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (path.parent.name for path in self.folder.glob(f"step_*/{_STATE_FILE}"))
        return sorted(int(name[5:]) for name in found if name[5:].isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint taken after ``step`` completed steps."""
        return self.folder / f"step_{step:07d}"

    def read_state(self, step: int) -> dict[str, Any]:
        """The small JSON beside the tensors; raises ValueError where it is none, or of another step."""
        path = self.path(step) / _STATE_FILE
        try:
            state = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"Checkpoint state {str(path)!r} is not JSON ({error}); {self._way_out(step)}") from error
        if not isinstance(state, dict) or state.get("step") != step:
            raise ValueError(f"Checkpoint state {str(path)!r} does not describe step {step}; {self._way_out(step)}")
        return state

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a checkpoint after ``step`` steps and drop those beyond ``keep``; all ranks must call.

        ``tensors`` are nested dicts of tensors, sharded or not; ``state`` is the JSON-serialisable rest, with the same
        ``step``. Raises OSError where it cannot be written; earlier ones are then as they were.
        """
        final, beside = self.path(step), self.folder / f"step_{step:07d}.incomplete"

        def begin() -> None:
            shutil.rmtree(beside, ignore_errors=True)  # left by a save of ours that was killed
            beside.mkdir(parents=True)

        def finish() -> None:
            files.write_text(beside / _STATE_FILE, json.dumps(state, indent=1))
            if final.exists():  # without its state, or it would have been resumed from
                final.rename(final.with_name(f"{final.name}.corrupt.{time.time_ns()}"))
            files.commit(beside, final)
            files.write_text(self.output_dir / "last_checkpoint", final.name)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))

        try:
            on_main_process(begin)
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(beside))
            on_main_process(finish)
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            if isinstance(error, MainProcessError):
                raise
            if is_main_process():
                shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
            free = shutil.disk_usage(self.output_dir).free >> 20
            raise OSError(
                f"Checkpoint {str(final)!r} cannot be written ({_cause(error)}; {free} MiB free); make room or mend "
                "the folder, and the run resumes from the checkpoint before it."
            ) from error
        logger.info("Saved checkpoint %s.", final)

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Fill ``tensors`` in place from the checkpoint of ``step``; all ranks must call.

        Raises ValueError where a file is missing or corrupt, or names or shapes differ from those saved.
        """
        reader = _RestrictedReader(self.path(step))
        try:
            reader.read_metadata()  # torch would report what is wrong with it as a traceback of its own
            dcp.load(tensors, storage_reader=reader)
        # Corrupt bytes lead to whatever they lead to; CheckpointException is no Exception.
        except (dcp.api.CheckpointException, Exception) as error:
            raise ValueError(
                f"Checkpoint {str(self.path(step))!r} is corrupt or does not fit this model ({_cause(error)}); resume "
                f"with the configuration it was saved with, or {self._way_out(step)}"
            ) from error

    def _way_out(self, step: int) -> str:
        earlier = [other for other in self.steps() if other < step]
        go_on = f"resume from {self.path(earlier[-1]).name}" if earlier else "start anew"
        return f"move that checkpoint out of {str(self.folder)!r} to {go_on}."


class _RestrictedReader(dcp.FileSystemReader):
    """A reader whose pickled metadata may name only what checkpoint metadata consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles checkpoint metadata and refuses every other class, so a doctored file cannot run code."""

    _NAMES = frozenset(
        {("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")}
        | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
        | {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict")}
        | {("torch.serialization", "_get_layout"), ("torch", "Size")}
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Checkpoint metadata names {module}.{name}, which is not checkpoint data.")


def _cause(error: BaseException) -> str:
    """Cause of failure on the first rank that failed: its first sentence."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while isinstance(error.__context__, OSError):  # torch's zip writer fails once more over the failed write
        error = error.__context__
    text = " ".join((str(error) or type(error).__name__).split())
    return text.split(". ")[0][:300]
