"""One file of the GDC to disk: resumed, verified, and named only when whole."""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

from dinov2.data.storage.retry import RemoteError
from prepatching_scripts.gdc.bandwidth import Bandwidth
from prepatching_scripts.gdc.manifest import GdcFile
from prepatching_scripts.gdc.query import ContentChanged, Gdc

# So many bytes gained buy another round of tries; a server that gives less is given up.
_PROGRESS = 8 << 20
_BLOCK = 1 << 20


class Stopped(Exception):
    """The download was told to stop; what came so far is kept."""


@dataclass(frozen=True)
class Downloads:
    """Fetches files into `<path>.part`, which the next run continues, and renames them once the md5 is right.

    May be used by several threads for different files. Another process at the same file is noticed.

    Attributes:
        gdc: The server.
        bandwidth: Bound on all threads together.
        stop: Ends all transfers when set.
        progress: Called with bytes gained, on disk or from the server; negative where they proved wrong.
        verify: Whether files that are there are read again; otherwise their size tells.
        redownload: Whether a wrong file that is there is put aside as `<path>.bad-N`, and fetched.
    """

    gdc: Gdc
    bandwidth: Bandwidth
    stop: threading.Event
    progress: Callable[[int], object]
    verify: bool = False
    redownload: bool = False

    def fetch(self, file: GdcFile, path: Path) -> bool:
        """Bring a file to `path`.

        Returns:
            Whether it was fetched; False if it was there.

        Raises:
            Stopped: If `stop` was set.
            FileExistsError: If another file is at `path`; it is left alone.
            BlockingIOError: If another process fetches it.
            OSError: If it cannot be fetched (see `Gdc.call`) or stored, or proves wrong.
        """
        if self._is_there(file, path):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as target:
            _lock(target, part)
            if path.exists():  # another process was faster
                return False
            transfer = _Transfer(self, file, target)
            try:
                transfer.run()
                os.fsync(target.fileno())
                part.rename(path)
            except OSError:
                if not os.fstat(target.fileno()).st_size:
                    part.unlink()
                    if path.parent.name == file.id:
                        with suppress(OSError):  # other files are in it
                            path.parent.rmdir()
                raise
        return True

    def _is_there(self, file: GdcFile, path: Path) -> bool:
        if not path.exists():
            return False
        if not path.is_file():
            raise FileExistsError(f"'{path}' is not a file; move it away")
        size = path.stat().st_size
        wrong = f"{size} bytes in place of {file.size}" if size != file.size else ""
        if self.verify and not wrong:
            md5 = self._md5(path)
            wrong = f"md5 {md5} in place of {file.md5}" if md5 != file.md5 else ""
        if not wrong:
            self.progress(file.size)
            return True
        if not self.redownload:
            raise FileExistsError(f"'{path}' has {wrong}; --redownload puts it aside and fetches it anew")
        _put_aside(path)
        return False

    def _md5(self, path: Path) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as source:
            while block := source.read(_BLOCK):
                self.check()
                digest.update(block)
        return digest.hexdigest()

    def check(self) -> None:
        """Raise Stopped if it is time."""
        if self.stop.is_set():
            raise Stopped


class _Transfer:
    """The bytes of one file, on disk up to `position` and in the digest."""

    def __init__(self, downloads: Downloads, file: GdcFile, target: BinaryIO) -> None:
        self._all, self._file, self._target = downloads, file, target
        self.position, self._digest = 0, hashlib.md5(usedforsecurity=False)

    def run(self) -> None:
        """Take what is on disk, fetch the rest; if the md5 is wrong then, once more from the start."""
        there = os.fstat(self._target.fileno()).st_size
        if there > self._file.size:
            self._restart()
            there = 0
        while self.position < there and (block := self._target.read(_BLOCK)):
            self._all.check()
            self._advance(block)
        self._fetch_rest()
        if self._digest.hexdigest() != self._file.md5:
            self._restart()
            self._fetch_rest()
        if (md5 := self._digest.hexdigest()) != self._file.md5:
            self._restart()
            url = self._all.gdc.locate(self._file)
            raise RemoteError(
                f"'{url}' has md5 {md5} in place of {self._file.md5}, twice; make a new manifest"
            )

    def _fetch_rest(self) -> None:
        url = self._all.gdc.locate(self._file)
        while self.position < self._file.size:
            before = self.position
            try:
                self._all.gdc.call(url, self._attempt)
            except RemoteError:
                if self.position < before + _PROGRESS:
                    raise

    def _attempt(self) -> None:
        self._all.check()
        size = self._file.size
        try:
            with self._all.gdc.stream(self._file, self.position) as response:
                if self.position and response.status_code == HTTPStatus.OK:  # the server has no ranges
                    self._restart()
                for block in response.iter_raw():
                    self._all.check()
                    if self.position + len(block) > size:
                        raise ContentChanged(f"more than {size} bytes came")
                    self._write(block)
                    self._all.bandwidth.take(len(block))
        except ContentChanged:
            self._restart()
            raise
        if self.position < size:
            raise ConnectionError(f"{self.position} of {size} bytes came")

    def _write(self, block: bytes) -> None:
        # Without a buffer, so that a kill loses nothing; a disk that fills up takes a part.
        rest = memoryview(block)
        while rest:
            rest = rest[self._target.write(rest) :]
        self._advance(block)

    def _advance(self, block: bytes) -> None:
        self._digest.update(block)
        self.position += len(block)
        self._all.progress(len(block))

    def _restart(self) -> None:
        self._all.progress(-self.position)
        self._target.seek(0)
        self._target.truncate()
        self.position, self._digest = 0, hashlib.md5(usedforsecurity=False)


def part_of(path: Path) -> Path:
    """Where a file is while it is fetched."""
    return path.with_name(f"{path.name}.part")


def _lock(target: BinaryIO, part: Path) -> None:
    busy = f"'{part}' is being written by another process"
    try:
        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(busy) from error
    except OSError:
        return  # a file system without locks
    # Between opening and locking another process may have finished and renamed it.
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(target.fileno()), part.stat()):
            return
    raise BlockingIOError(busy)


def _put_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    path.rename(aside)
