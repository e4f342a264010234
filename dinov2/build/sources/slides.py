"""Tiles cut from slides at random positions while training, as section ``online`` says."""

import os
import tempfile
from pathlib import Path

from dinov2.build.sources import first_line, is_slide, is_url, refuse_groups, refuse_revision
from dinov2.data.kinds import endings
from dinov2.data.source import Source, SourceRequest


class Slides:
    """Whole-slide images; what is drawn from them has no end, unless ``data.max_tiles`` says how many."""

    accepts = (
        "slides (a folder of them, one slide or its URL, a text file of paths, a CSV with a column 'path', 'slide', "
        "'wsi' or 'slide_id', or a tile index)"
    )

    def recognises(self, path: str) -> bool:
        """Whether there are slides, or a list of them."""
        from dinov2.data.slides.find import is_header
        from dinov2.data.slides.index import is_tile_index
        from dinov2.data.slides.tables import unquoted

        local = os.path.expanduser(path.removeprefix("file://"))
        if is_slide(path) if is_url(path) else any(is_slide(file, file == local) for file in endings(path).values()):
            return True
        if os.path.isfile(path) and is_tile_index(Path(path)):
            return True
        line = first_line(path)
        return is_slide(unquoted(line), named=True) or (line != "" and is_header(line, Path(local)))

    def open(self, request: SourceRequest) -> Source:
        """Make the slides ready, which takes a while at the first start and nothing later."""
        from dinov2.data.online.prepare import TileOptions, mpps_of
        from dinov2.data.online.random import OnlineTileSource
        from dinov2.data.slides.find import find_slides
        from dinov2.data.slides.resolution import read_mpp_table
        from dinov2.data.slides.tissue import CELL_RULE, TissueRule

        refuse_revision(request)
        refuse_groups(request)
        online, data = request.config.online, request.config.data
        if online.cache_dir:
            cache = Path(online.cache_dir)
        else:
            cache = request.cache.with_name("slide_cache") if request.cache else Path(tempfile.mkdtemp("path-fm"))
        mpps = mpps_of(online.magnifications) if online.magnifications else online.mpp
        weights = online.mpp_weights or (1.0,) * len(mpps)
        table = read_mpp_table(data.mpp_file) if data.mpp_file else None
        rows = find_slides(request.path, online.weight_column, table, data.slide_root or None).slides
        kept = [row for row in rows if request.keep(row.path, row.patient)]
        if not kept:
            raise ValueError(
                f"Of the {len(rows)} slides of '{request.path}' all are excluded or kept for validation; at least 1 "
                "must be left to train on."
            )
        return OnlineTileSource(
            kept,
            cache,
            options=TileOptions(mpps, weights, data.tile_size, online.min_foreground, data.mpp_tolerance),
            seed=request.config.train.seed,
            slide_fraction=data.slide_fraction,
            max_tiles=data.max_tiles,
            workers=os.cpu_count() or 1,
            rule=TissueRule(online.tissue, online.tissue_options.get(online.tissue), CELL_RULE.min_fraction),
        )
