"""A folder that is read by ranges only, as remote datasets are."""

from pathlib import Path

from dinov2.data.storage.base import LocalStorage, StoredFile


class RemoteFolder:
    """A folder that is no local storage.

    Attributes:
        reads: start and length of each.
        failure: raised by the next reads, where there is one.
    """

    def __init__(self, folder: Path, location: str = "memory://set") -> None:
        self._inside, self.location = LocalStorage(str(folder)), location
        self.reads: list[tuple[int, int]] = []
        self.failure: Exception | None = None

    def list_files(self) -> list[StoredFile]:
        return self._inside.list_files()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        if self.failure:
            raise self.failure
        self.reads.append((start, length))
        return self._inside.read_range(name, start, length)

    def locate(self, name: str) -> str:
        return f"{self.location}/{name}"
