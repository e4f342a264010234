"""Save, find, verify, load and retain sharded training checkpoints.

A checkpoint is a folder ``checkpoints/step_XXXXXXX`` holding one file of tensors per rank, ``state.json`` and the
checksums of all these. It is written beside under a temporary name, brought to the disk and renamed when complete, so a
folder with the final name is whole; ``last_checkpoint`` names the newest. Tensors are addressed by name: any number of
ranks can read them. Whatever is found corrupt later is set aside under another name, and nothing deletes it.
"""

import errno
import itertools
import json
import logging
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from dinov2.distributed import (
    MainProcessError,
    background_group,
    gather_objects,
    get_global_rank,
    get_global_size,
    is_main_process,
    on_main_process,
)
from dinov2.utils import files

logger = logging.getLogger("dinov2")

_STATE_FILE = "state.json"
_LAST = "last_checkpoint"
_CHECKSUMS = "checksums.xxh128"  # as of xxhsum: that command verifies a folder, too
_STEP = re.compile(r"step_(\d{7,})")
_BESIDE = ".incomplete"
_ASIDE = ".corrupt"
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ELOOP)  # the file's own; not permissions, or a server that is away
# Of each tensor beside its bytes: torch's zip around it, and its entry in the metadata.
_TENSOR_OVERHEAD = 4096


@dataclass
class _Found:
    """A checkpoint on the disk and what rank 0 has seen of it."""

    step: int
    state: Any = None
    checksums: Mapping[str, str] | None = None  # by name of file; None where an earlier version wrote none
    fault: str = ""


class Checkpointer:
    """The checkpoints of the run in ``output_dir``.

    `save` keeps the ``keep`` newest complete ones and those of steps that are multiples of ``keep_every`` (0: none).
    In the ``background`` it writes from a copy in host memory, and returns when that is made.
    """

    def __init__(self, output_dir: Path, keep: int, keep_every: int = 0, background: bool = False):
        self.output_dir, self.folder = output_dir, output_dir / "checkpoints"
        self.keep, self.keep_every, self.background = keep, keep_every, background
        self._thread, self._group = ThreadPoolExecutor(1, "checkpoint"), None
        self._pending: tuple[int, Future[None]] | None = None
        self.longest_s = 0.0  # seconds that a save took until it was on the disk
        self._host: dict[str, Any] | None = None  # copies, filled anew by each save
        # Without a process group torch warns that it assumes a single process, which here is so.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self._folders() if (self.path(step) / _STATE_FILE).exists()]

    def path(self, step: int) -> Path:
        """Folder of the checkpoint taken after ``step`` completed steps."""
        return self.folder / f"step_{step:07d}"

    def newest(self, decode: Callable[[Any], dict[str, Any]]) -> dict[str, Any] | None:
        """The decoded ``state.json`` of the newest checkpoint that is as it was written; None where there is no run.

        Each rank verifies a share of the files; all ranks must call. Corrupt checkpoints are set aside with a warning.
        ``decode`` raises ValueError where the JSON is not a state.

        Raises ValueError if none is left, or a state is as it was written and cannot be decoded; OSError if a file is
        there and cannot be read.
        """
        while found := on_main_process(partial(self._examine, decode)):
            faults = gather_objects(self._faults(found))
            if on_main_process(partial(self._accept, found, faults)):
                return found.state
        return None

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a checkpoint after ``step`` steps and drop those that are not kept; all ranks must call.

        ``tensors`` are nested dicts of tensors, sharded or not; ``state`` is the JSON-serialisable rest. In the
        background only one save is under way, and the one before is waited for. Raises OSError where it, or this one,
        cannot be written, or there is no room; earlier checkpoints are then as they were.
        """
        self.finish()
        text = json.dumps({**state, "checksums": _CHECKSUMS}, indent=1)
        leaves = tree_leaves(tensors)
        needed = sum(t.numel() * t.element_size() + _TENSOR_OVERHEAD for t in leaves) + len(text)
        on_main_process(partial(self._begin, step, needed))
        self._group = self._group or background_group()
        if self.background:
            tensors = self._host = self._host_copies(tensors)
        self._pending = step, self._thread.submit(self._write, step, tensors, text)
        if not self.background:
            self.finish()

    @property
    def has_failed(self) -> bool:
        """Whether the save in the background has ended with an error, which `finish` will raise."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one; raises OSError where it failed. All ranks must call."""
        if self._pending is None:
            return
        step, written = self._pending
        wait([written])  # a Ctrl-C in here leaves it pending, for those who close the run
        self._pending = None
        try:
            written.result()
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            if isinstance(error, MainProcessError):
                raise
            if is_main_process():
                shutil.rmtree(self._beside(step), ignore_errors=True)  # a full disk needs the room
            free = shutil.disk_usage(self.output_dir).free >> 20
            raise OSError(
                f"Checkpoint {str(self.path(step))!r} cannot be written ({_cause(error)}; {free} MiB free); make room "
                "or mend the folder, and the run resumes from the checkpoint before it."
            ) from error
        logger.info("Saved checkpoint %s.", self.path(step))

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

    def sweep(self) -> None:
        """Delete what saves and deletions of killed processes have left; none may be at work. Rank 0 calls."""
        for path in self.folder.glob(f"step_*{_BESIDE}"):
            if _STEP.fullmatch(path.name.removesuffix(_BESIDE)):
                logger.info("Removing %s, which was never finished.", path)
                _delete(path, path)

    def _folders(self) -> list[int]:
        """Steps of all folders with a checkpoint's name, and of links to such, ascending."""
        there = (path.name for path in self.folder.glob("step_*") if path.is_dir() or path.is_symlink())
        return sorted(int(name[1]) for name in map(_STEP.fullmatch, there) if name)

    def _beside(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}{_BESIDE}"

    def _examine(self, decode: Callable[[Any], dict[str, Any]]) -> _Found | None:
        """The newest checkpoint, with its state and checksums, or what is wrong with them."""
        if not (steps := self._folders()):
            if aside := sorted(path.name for path in self.folder.glob(f"step_*{_ASIDE}*")):
                raise ValueError(
                    f"No checkpoint in {str(self.folder)!r} can be used, since all were set aside as corrupt "
                    f"({', '.join(aside)}); put a copy of one there, or start anew in another output folder."
                )
            if (last := self.output_dir / _LAST).exists():
                raise ValueError(
                    f"Folder {str(self.folder)!r} holds no checkpoint, and {str(last)!r} says that there was one; put "
                    "it back, or start anew in another output folder."
                )
            return None
        found, path = _Found(steps[-1]), self.path(steps[-1])
        if not path.exists():
            raise FileNotFoundError(
                f"Checkpoint {str(path)!r} is a link to {str(path.readlink())!r}, which is not there; bring that back, "
                f"or {self._way_out(found.step)}"
            )
        try:
            written = _read_json(path / _STATE_FILE)
            there = (path / _CHECKSUMS).exists() or (isinstance(written, dict) and "checksums" in written)
            found.checksums = _read_checksums(path) if there else None
        except ValueError as error:
            found.fault = str(error)
            return found
        except OSError as error:
            if not (fault := _damage(error)):
                raise self._unreadable(found.step, error) from error
            found.fault = fault
            return found
        try:
            found.state = decode(written)
            if (step := found.state.get("step")) != found.step:
                raise ValueError(f"step = {step!r} is not that of the folder; expected {found.step}")
        except ValueError as error:
            if found.checksums and files.checksum(path / _STATE_FILE) == found.checksums[_STATE_FILE]:
                raise ValueError(
                    f"Checkpoint state {str(path / _STATE_FILE)!r} is intact and none of this version "
                    f"({_one_line(error)}); resume with the version that wrote it, or {self._way_out(found.step)}"
                ) from error
            found.fault = f"{_STATE_FILE}: {error}"
        return found

    def _faults(self, found: _Found) -> str | OSError:
        """What is wrong with this rank's share of the files."""
        if found.fault or not found.checksums:
            return found.fault
        path, share = self.path(found.step), sorted(found.checksums)[get_global_rank() :: get_global_size()]
        try:
            return next(filter(None, (_fault(path / name, found.checksums[name]) for name in share)), "")
        except OSError as error:
            return error

    def _accept(self, found: _Found, faults: list[str | OSError]) -> bool:
        """Set a corrupt checkpoint aside; whether it is not."""
        path = self.path(found.step)
        for fault in faults:
            if isinstance(fault, OSError):
                raise self._unreadable(found.step, fault) from fault
        if fault := next(filter(None, faults), ""):
            self._set_aside(path, fault)
            return False
        if found.checksums is None:
            logger.warning("Checkpoint %s has no checksums, as of an earlier version: it is taken unverified.", path)
        return True

    def _set_aside(self, path: Path, fault: str) -> None:
        names = itertools.chain([path.name + _ASIDE], (f"{path.name}{_ASIDE}.{n}" for n in itertools.count(2)))
        aside = next(name for name in map(path.with_name, names) if not name.exists())
        path.rename(aside)
        logger.warning("Checkpoint %s is corrupt (%s); it is kept as %s.", path, _one_line(fault), aside.name)
        if steps := self.steps():
            files.write_text(self.output_dir / _LAST, self.path(steps[-1]).name)

    def _begin(self, step: int, needed: int) -> None:
        """Make the folder to write into, where there is room for ``needed`` bytes."""
        beside = self._beside(step)
        try:
            shutil.rmtree(beside, ignore_errors=True)  # left by a save of ours that failed
            beside.mkdir(parents=True)
            free = shutil.disk_usage(beside).free
        except OSError as error:
            raise OSError(
                f"Checkpoint {str(self.path(step))!r} cannot be written ({error}); mend the folder, and the run "
                "resumes from the checkpoint before it."
            ) from error
        if free < needed:
            beside.rmdir()
            raise OSError(
                f"Checkpoint {str(self.path(step))!r} needs {needed / 2**20:.1f} MiB and {str(self.folder)!r} has "
                f"{free / 2**20:.1f} MiB free; make room, and the run resumes from the checkpoint before it."
            )

    def _write(self, step: int, tensors: dict[str, Any], text: str) -> None:
        """Write, complete and name a checkpoint; the ranks' threads talk in a group of their own."""
        beside, started = self._beside(step), time.monotonic()
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(beside), process_group=self._group)
        try:
            own = {path.name: files.checksum(path) for path in beside.glob(f"__{get_global_rank()}_*")}
        except OSError as error:
            own = error
        parts = gather_objects(own, self._group)
        on_main_process(partial(self._complete, step, parts, text), self._group)
        self.longest_s = max(self.longest_s, time.monotonic() - started)

    def _complete(self, step: int, parts: list[dict[str, str] | OSError], text: str) -> None:
        final, beside, checksums = self.path(step), self._beside(step), {}
        for part in parts:
            if isinstance(part, OSError):
                raise part
            checksums |= part
        files.write_text(beside / _STATE_FILE, text)
        checksums |= {name: files.checksum(beside / name) for name in (".metadata", _STATE_FILE)}
        # Last: without it the folder is no checkpoint.
        files.write_text(beside / _CHECKSUMS, (f"{value}  {name}\n" for name, value in sorted(checksums.items())))
        if final.exists():  # put there since the run began, or that would have resumed from it
            self._set_aside(final, "this run, which did not begin with it, saves the same step")
        files.commit(beside, final)
        files.write_text(self.output_dir / _LAST, final.name)
        for old in self.steps()[: -self.keep]:
            if not self.keep_every or old % self.keep_every:
                # Under the other name a deletion that is cut short leaves no checkpoint with holes.
                _delete(self.path(old), self._beside(old))

    def _host_copies(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copies in host memory; that of the save before is used again, since new memory takes longer to come by."""
        if self._host is None or tree_structure(self._host) != tree_structure(tensors):
            return tree_map(_host_copy, tensors)
        return tree_map(_host_copy, tensors, self._host)

    def _unreadable(self, step: int, error: OSError) -> OSError:
        return OSError(
            f"Checkpoint {str(self.path(step))!r} cannot be read ({error}); mend that, or {self._way_out(step)}"
        )

    def _way_out(self, step: int) -> str:
        if earlier := [other for other in self.steps() if other < step]:
            return f"move that checkpoint out of {str(self.folder)!r} to resume from {self.path(earlier[-1]).name}."
        return "start anew in another output folder."


def _delete(path: Path, beside: Path) -> None:
    """Rename a folder and delete it, of a link the link alone; where that fails it stays, with a warning."""
    try:
        path.rename(beside)
        if beside.is_symlink():
            beside.unlink()
        else:
            shutil.rmtree(beside)
    except OSError as error:
        logger.warning("%s is no longer needed and cannot be deleted (%s).", path, error)


def _host_copy(tensor: Tensor, host: Tensor | None = None) -> Tensor:
    """A copy, sharded like the tensor, where possible in ``host``."""
    if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
        return tensor.detach().to("cpu", copy=True)
    _local(host).copy_(_local(tensor.detach()))
    return host


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def _read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by name of file; raises ValueError unless they are of all files that make a checkpoint."""
    found = {}
    for line in (folder / _CHECKSUMS).read_bytes().decode(errors="replace").split("\n"):
        checksum, _, name = line.partition("  ")
        found[name] = checksum
    needed = {"", _STATE_FILE, ".metadata", *(path.name for path in folder.glob("*.distcp"))}
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{_CHECKSUMS} does not list {missing[0] or 'all that it did'}")
    del found[""]  # after the last line
    if foreign := [name for name in found if Path(name).name != name]:
        raise ValueError(f"{_CHECKSUMS} lists {foreign[0]!r}, which is no file of the folder")
    return found


def _fault(path: Path, expected: str) -> str:
    """What is wrong with a file; empty where nothing is. Raises OSError where that cannot be told."""
    try:
        found = files.checksum(path)
    except OSError as error:
        if not (fault := _damage(error, path.name)):
            raise
        return fault
    return "" if found == expected else f"{path.name} has checksum {found!r} in place of {expected!r}"


def _damage(error: OSError, name: str = "") -> str:
    """The fault of the file that a failed read stands for; empty where it may be one of access."""
    name = name or Path(error.filename or "a file").name
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} cannot be read: {error.strerror}" if error.errno in _DAMAGE else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")


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
