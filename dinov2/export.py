"""Write a teacher for other libraries: ``python -m dinov2.export --checkpoint T --format hf --output DIR``.

`save_teacher` writes the file that training exports, which this and `dinov2.hub.load_teacher` open.
"""

from __future__ import annotations

import sys

from dinov2.hub.export.command import main
from dinov2.hub.save import save_teacher

__all__ = ["main", "save_teacher"]

if __name__ == "__main__":
    sys.exit(main())
