"""Tiles of slides by a list of their positions."""

import re

from dinov2.build.sources import first_line, refuse_groups, refuse_revision
from dinov2.data.source import Source, SourceRequest

_LINE = re.compile(r".*\S\s+\d+\s+\d+\s+\d+(\s+[\d.eE+-]+\s+[\d.eE+-]+)?")


class SampleList:
    """Lines ``slide x y level``, or with the two columns ``mpp_x mpp_y``; each is cut while training."""

    accepts = "a sample list (a text file of lines 'slide x y level', or with 'mpp_x mpp_y')"

    def recognises(self, path: str) -> bool:
        """Whether the first line is one of a sample list."""
        return bool(_LINE.fullmatch(first_line(path)))

    def open(self, request: SourceRequest) -> Source:
        """Read the list and open its slides."""
        from dinov2.data.online.from_list import SlideListSource

        refuse_revision(request)
        refuse_groups(request)
        data = request.config.data
        return SlideListSource(
            request.path,
            data.slide_root or None,
            data.tile_size,
            columns=data.sample_list_columns or None,
            mpp_file=data.mpp_file or None,
            mpp_tolerance=data.mpp_tolerance,
        )
