"""A pause before a server is asked again, kept by all processes of one user on one machine."""

import os
import re
import tempfile
import time
from contextlib import suppress


class SharedPause:
    """The time to go on, as the modification time of an empty file; nothing is locked and nothing to clean up.

    Where the file cannot be written, the process that was told to wait still waits, only the others do not.

    Args:
        server: Whose pause it is; a host, say.
        longest_s: Bound of a pause in seconds.
        folder: Where the file lies; the machine's temporary folder if empty.
    """

    def __init__(self, server: str, longest_s: float, folder: str = "") -> None:
        name = f"path-fm-pause-{os.getuid()}-{re.sub(r'[^A-Za-z0-9.-]', '_', server)}"
        self._path, self._longest_s = os.path.join(folder or tempfile.gettempdir(), name), longest_s

    def remaining_s(self) -> float:
        """Seconds until the server may be asked again; 0 if it may be asked now."""
        try:
            stat = os.lstat(self._path)
        except OSError:
            return 0.0
        left = stat.st_mtime - time.time()
        # Farther than any pause noted here: somebody else's file, or the clock was set back.
        foreign = stat.st_uid != os.getuid() or left > self._longest_s + 1
        return 0.0 if foreign else max(0.0, left)

    def extend(self, seconds: float) -> bool:
        """Make the pause last `seconds` from now, unless it already does; return whether this made it longer."""
        seconds = min(seconds, self._longest_s)
        if (left := self.remaining_s()) and left > seconds - 1:
            return False
        until = time.time() + seconds
        with suppress(OSError):
            file = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            try:
                os.utime(file, (until, until))
            finally:
                os.close(file)
        return True
