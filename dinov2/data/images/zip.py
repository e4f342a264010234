"""Zip archives of images, stored or deflated."""

import zipfile
import zlib
from collections.abc import Sequence

from dinov2.data.images.container import Contents, Member, open_stored, read_members
from dinov2.data.images.files import is_image
from dinov2.data.storage.base import FileType, Storage, StoredFile
from dinov2.data.storage.retry import RemoteError

_HEADER = 30  # bytes of a member's own header, before its name
_ENCRYPTED = 1  # flag
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}


class ZipArchives:
    """Zip files, whose table of contents takes two reads or three; a checksum tells corrupt members."""

    files = FileType("zip", (".zip",))

    def contents(self, storage: Storage, file: StoredFile) -> Contents:
        """List the images of an archive; ValueError if it is none, or needs a password or an unknown method."""
        with open_stored(storage, file) as opened:
            try:
                with zipfile.ZipFile(opened) as archive:
                    stored, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
            except RemoteError:
                raise
            except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
                raise ValueError(" ".join(str(error).split())) from error
        ends = [*(info.header_offset for info in stored), end][1:]
        members = []
        for info, after in zip(stored, ends, strict=True):
            if info.is_dir() or not is_image(info.filename):
                continue
            if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
                found = "encrypted" if info.flag_bits & _ENCRYPTED else f"of compression method {info.compress_type}"
                raise ValueError(f"'{info.filename}' is {found}; {', '.join(_METHODS.values())} members are accepted")
            start = info.header_offset
            check = info.CRC << 1 | (info.compress_type == zipfile.ZIP_DEFLATED)
            members.append(Member(info.filename, start, max(0, after - start), info.file_size, check))
        return Contents(members)

    def read(self, storage: Storage, file: StoredFile, members: Sequence[Member]) -> list[bytes]:
        """Read and inflate files."""
        return [
            _unpack(data, member) for data, member in zip(read_members(storage, file, members), members, strict=True)
        ]


def _unpack(stored: memoryview, member: Member) -> bytes:
    # The lengths of name and extra field need not be those of the table of contents.
    skipped = _HEADER + int.from_bytes(stored[26:28], "little") + int.from_bytes(stored[28:30], "little")
    crc, deflated = divmod(member.check, 2)
    try:
        if deflated:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored[skipped:], member.size)
        else:
            data = bytes(stored[skipped : skipped + member.size])
    except zlib.error:
        return b""
    return data if len(data) == member.size and zlib.crc32(data) == crc else b""
