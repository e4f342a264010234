"""Byte ranges of a slide's file, from a disk or a server."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dinov2.data.storage.base import public_name
from dinov2.data.storage.fsspec import filesystem
from dinov2.data.storage.retry import RemoteError, Retries, is_transient, reason

_REMOTE_GAP = 64 << 10  # bytes between two ranges that cost less than another request
Range = tuple[int, int]


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


class SlideBytes:
    """A file on a disk, or behind an fsspec URL (s3://, gs://, https://), read in ranges.

    Safe in several threads and after a fork: nothing has a position, and connections are those of a process.
    """

    def __init__(self, path: str | Path, retries: Retries | None = None) -> None:
        self._path, self._remote = str(path), is_remote(path)
        self._retries = retries or Retries()
        self._file: BinaryIO | None = None
        self._pid = -1

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Read ranges (offset, length) in the order given; adjacent ones together, those of a server in one batch.

        A length of 0 gives b"". OSError if the file cannot be read or ends within a range, RemoteError by a server.
        """
        wanted = ((offset, offset + length) for offset, length in ranges if length > 0)
        spans = merge(wanted, _REMOTE_GAP if self._remote else 0)
        blocks = self._from_server(spans) if self._remote else self._from_disk(spans)
        starts, parts = [start for start, _ in spans], []
        for offset, length in ranges:
            if length <= 0:
                parts.append(b"")
                continue
            number = bisect_right(starts, offset) - 1
            parts.append(blocks[number][offset - starts[number] : offset - starts[number] + length])
        return parts

    def size(self) -> int:
        """Size of the local file in bytes, as opened."""
        return os.fstat(self._opened().fileno()).st_size

    def close(self) -> None:
        """Give the handle back; the next read opens it again. A thread that is reading keeps it until it is done."""
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _opened(self) -> BinaryIO:
        file = self._file
        if file is None or self._pid != os.getpid():
            file = self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
            self._pid = os.getpid()
        return file

    def _from_disk(self, spans: Sequence[Range]) -> list[bytes]:
        # The object, not its number: a number may by then belong to another file that a thread opened.
        file, blocks = self._opened(), []
        for start, end in spans:
            data = b""
            while len(data) < end - start:
                more = os.pread(file.fileno(), end - start - len(data), start + len(data))
                if not more:
                    raise OSError(f"'{self._path}' ends within bytes {start} to {end - 1}, after {len(data)} of them")
                data += more
            blocks.append(data)
        return blocks

    def _from_server(self, spans: Sequence[Range]) -> list[bytes]:
        got: dict[Range, bytes] = {}
        url = public_name(self._path)

        def ask() -> None:
            """Ask once for the spans that are not in `got`; raises for those that did not come."""
            left = [span for span in spans if span not in got]
            fs, path = filesystem(self._path, self._retries)
            starts, ends = zip(*left, strict=True)
            answers = fs.cat_ranges([path] * len(left), list(starts), list(ends), on_error="return")
            errors = []
            for (start, end), answer in zip(left, answers, strict=True):
                if isinstance(answer, BaseException):
                    errors.append(answer)
                elif len(answer) > end - start:
                    message = f"'{url}' was asked for {end - start} bytes and gave {len(answer)}"
                    raise RemoteError(f"{message}; use a server that supports ranges, or a local copy")
                elif len(answer) < end - start:
                    errors.append(ConnectionError(f"{len(answer)} of {end - start} bytes came"))
                else:
                    got[start, end] = answer
            if errors:  # one that lasts, if there is any, since another request would meet it again
                raise next((error for error in errors if not is_transient(error)), errors[0])

        try:
            if spans:
                self._retries.call(url, ask)
        except OSError:
            raise
        except Exception as error:
            raise RemoteError(f"'{url}' cannot be read ({reason(error)})") from error
        return [got[span] for span in spans]


def merge(ranges: Iterable[Range], gap: int) -> list[Range]:
    """Join (start, end) ranges that overlap or lie at most `gap` bytes apart; sorted."""
    spans: list[Range] = []
    for start, end in sorted(ranges):
        if spans and start <= spans[-1][1] + gap:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    return spans
