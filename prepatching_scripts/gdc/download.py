"""Files of the GDC to disk: resumed, verified, and named only when whole."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from dinov2.utils.files import locked
from prepatching_scripts.gdc.manifest import GdcFile
from prepatching_scripts.gdc.query import BrokenAnswer, Gdc

_PROGRESS = 8 << 20  # so many bytes gained buy another round of attempts; a server that gives less is given up
_BLOCK = 1 << 20
_BURST_S = 0.5  # seconds' worth of bytes that may come at once


class Stopped(Exception):
    """The download was told to stop; what came so far is kept."""


class Downloads:
    """Fetches files into `<path>.part`, which the next run continues, and renames them once the md5 is right.

    May be used by several threads for different files. Another process at the same file is noticed.

    Args:
        gdc: the server.
        stop: ends all transfers when set.
        progress: called with bytes gained, on disk or from the server; negative where they proved wrong.
        limit: bytes per second of all threads together; None is no limit.
        verify: files that are there are read again; otherwise their size tells.
        redownload: a wrong file that is there is put aside as `<path>.bad-N`, and fetched.
    """

    def __init__(
        self, gdc: Gdc, stop: threading.Event, progress: Callable[[int], object],
        limit: float | None = None, verify: bool = False, redownload: bool = False,
    ) -> None:  # fmt: skip
        self.stop, self.gdc, self.progress, self._limit = stop, gdc, progress, limit
        self._verify, self._redownload = verify, redownload
        self._lock, self._paid_until = threading.Lock(), 0.0

    def fetch(self, file: GdcFile, path: Path) -> bool:
        """Bring a file to `path`; returns whether it was fetched, False if it was there.

        Raises:
            Stopped: if `stop` was set.
            FileExistsError: if another file is at `path`, which is left alone, or another process fetches it.
            OSError: if it cannot be fetched (see `Gdc.call`) or stored, or proves wrong.
        """
        if self._is_there(file, path):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        # Closing the file drops the lock, so it stays open until the part has its name.
        with locked(part, busy=f"'{part}' is being written by another process."), part.open("r+b", 0) as target:
            try:
                if path.exists():  # another process was faster
                    return False
                _Transfer(self, file, target).run()
                os.fsync(target.fileno())
                part.rename(path)
            finally:
                if part.exists() and not os.fstat(target.fileno()).st_size:
                    part.unlink()
                    if path.parent.name == file.id:
                        with suppress(OSError):  # other files are in it
                            path.parent.rmdir()
        return True

    def check(self) -> None:
        """Raise Stopped if it is time."""
        if self.stop.is_set():
            raise Stopped

    def pace(self, num_bytes: int) -> None:
        """Wait until the limit allows the next bytes after these, which came."""
        if self._limit is None:
            return
        with self._lock:
            now = time.monotonic()
            self._paid_until = max(self._paid_until, now - _BURST_S) + num_bytes / self._limit
            wait = self._paid_until - now
        self.stop.wait(max(0.0, wait))

    def _is_there(self, file: GdcFile, path: Path) -> bool:
        if not path.exists():
            return False
        if not path.is_file():
            raise FileExistsError(f"'{path}' is not a file; move it away.")
        size = path.stat().st_size
        wrong = f"{size} bytes in place of {file.size}" if size != file.size else ""
        if self._verify and not wrong:
            digest = hashlib.md5(usedforsecurity=False)
            with path.open("rb") as content:
                while block := content.read(_BLOCK):
                    self.check()
                    digest.update(block)
            if digest.hexdigest() != file.md5:
                wrong = f"md5 {digest.hexdigest()} in place of {file.md5}"
        if not wrong:
            self.progress(file.size)
            return True
        if not self._redownload:
            raise FileExistsError(f"'{path}' has {wrong}; --redownload puts it aside and fetches it anew.")
        number = 1
        while (aside := path.with_name(f"{path.name}.bad-{number}")).exists():
            number += 1
        path.rename(aside)
        return False


class _Transfer:
    """The bytes of one file, on disk up to `position` and in the digest."""

    def __init__(self, downloads: Downloads, file: GdcFile, target: BinaryIO) -> None:
        self._downloads, self._gdc = downloads, downloads.gdc
        self._file, self._target = file, target
        self._url = f"{self._gdc.endpoint}/data/{file.id}"
        self.position, self._digest = 0, hashlib.md5(usedforsecurity=False)

    def run(self) -> None:
        """Take what is on disk, fetch the rest; if the md5 is wrong then, once more from the start."""
        there = os.fstat(self._target.fileno()).st_size
        if there > self._file.size:
            self._restart()
            there = 0
        while self.position < there and (block := self._target.read(_BLOCK)):
            self._downloads.check()
            self._advance(block)
        for _ in range(2):
            while self.position < self._file.size:
                before = self.position
                try:
                    self._gdc.call(self._url, self._attempt)
                except ConnectionError:
                    if self.position < before + _PROGRESS:
                        raise
            if (md5 := self._digest.hexdigest()) == self._file.md5:
                return
            self._restart()
        raise ConnectionError(f"'{self._url}' has md5 {md5} in place of {self._file.md5}, twice; make a new manifest.")

    def _attempt(self) -> None:
        """Ask once for what is missing; keeps what came."""
        self._downloads.check()
        start, size = self.position, self._file.size
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._gdc.client.stream("GET", self._url, headers=headers) as response:
            response.raise_for_status()
            resumed = response.status_code == 206
            length, expected = response.headers.get("content-length"), size - resumed * start
            if length not in (None, str(expected)):
                raise BrokenAnswer(f"{length} bytes are offered, {expected} are expected")
            if start and not resumed:  # the server has no ranges
                self._restart()
            for block in response.iter_raw():
                self._downloads.check()
                if self.position + len(block) > size:
                    self._restart()
                    raise BrokenAnswer(f"more than {size} bytes came")
                rest = memoryview(block)  # unbuffered, so that a kill loses nothing; a full disk takes a part
                while rest:
                    rest = rest[self._target.write(rest) :]
                self._advance(block)
                self._downloads.pace(len(block))
        if self.position < size:
            raise BrokenAnswer(f"{self.position} of {size} bytes came")

    def _advance(self, block: bytes) -> None:
        self._digest.update(block)
        self.position += len(block)
        self._downloads.progress(len(block))

    def _restart(self) -> None:
        self._downloads.progress(-self.position)
        self._target.seek(0)
        self._target.truncate()
        self.position, self._digest = 0, hashlib.md5(usedforsecurity=False)


def part_of(path: Path) -> Path:
    """Name a file while it is fetched."""
    return path.with_name(f"{path.name}.part")
