"""Tar shards in WebDataset's convention."""

import tarfile
from collections.abc import Iterator, Sequence

from dinov2.data.images.container import Contents, Member, open_stored, read_members
from dinov2.data.images.files import is_image
from dinov2.data.storage.base import FileType, Storage, StoredFile
from dinov2.data.storage.retry import RemoteError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarShards:
    """Uncompressed tar files, in which consecutive members of one key are one sample.

    The key is a member's name up to the first dot of its last part. Of a sample's images the one with the shortest
    ending is its tile (``7.png``, not ``7.mask.png``), the first of several; what is no image is left out. Tar has no
    table of contents, so that a shard over a network is read through once, when it is indexed.
    """

    files = FileType("tar", (".tar",))

    def contents(self, storage: Storage, file: StoredFile) -> Contents:
        """List the tiles of a shard; of one that is cut short those before the end."""
        members: list[Member] = []
        fault = ""
        with open_stored(storage, file) as opened:
            try:
                with tarfile.open(fileobj=opened, mode="r:") as archive:
                    members.extend(_tiles(archive, file.size))
            except RemoteError:
                raise
            except (tarfile.TarError, EOFError, OSError, ValueError) as error:
                fault = " ".join(str(error).split())
                opened.seek(0)
                start = opened.read(max(map(len, _COMPRESSED)))
                if codec := next((codec for mark, codec in _COMPRESSED.items() if start.startswith(mark)), ""):
                    fault = f"it is compressed by {codec}; an uncompressed one is expected"
        return Contents(members, fault)

    def read(self, storage: Storage, file: StoredFile, members: Sequence[Member]) -> list[bytes]:
        """Read files as they are stored."""
        return [bytes(data) for data in read_members(storage, file, members)]


def _tiles(archive: tarfile.TarFile, size: int) -> Iterator[Member]:
    key, tile, ending = None, None, ""
    while (found := archive.next()) is not None:
        archive.members.clear()  # which it would keep, all of them
        name = found.name.removeprefix("./")
        if not found.isreg() or not is_image(name):
            continue
        folder, _, last = name.rpartition("/")
        stem, _, suffix = last.partition(".")
        if key != (folder, stem):
            if tile:
                yield tile
            key, tile = (folder, stem), None
        if found.offset_data + found.size <= size and (not tile or suffix.count(".") < ending.count(".")):
            tile, ending = Member(name, found.offset_data, found.size, found.size), suffix
    if tile:
        yield tile
