"""Tiles in Parquet shards."""

import os
import re

from dinov2.build.sources import holds, is_url, refuse_groups
from dinov2.data.images.files import IMAGES
from dinov2.data.kinds import endings
from dinov2.data.source import Source, SourceRequest
from dinov2.data.storage.base import is_shard

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[^/]+(/(convert|pr)/[^/]+)?)?")
_OTHERS = re.compile(
    r"\.(tar|tgz|tar\.gz|zip|h5|hdf5|txt|csv|tsv|json|jpe?g|png|webp|bmp|jp2|svs|ndpi|mrxs|tiff?|btf|qptiff|czi|dcm)$",
    re.IGNORECASE,
)


class ParquetShards:
    """Shards with a column of encoded images and one of slides."""

    accepts = "Parquet shards (a folder, glob, file or URL of them, or a hub dataset as org/name)"

    def recognises(self, path: str) -> bool:
        """Whether there are shards, or a hub id or URL that does not name files of another kind."""
        if is_url(path):
            return not _OTHERS.search(path.rstrip("/"))
        if os.path.exists(os.path.expanduser(path.removeprefix("file://"))) or path.startswith("file://"):
            found = [ending for ending in endings(path) if is_shard(ending)]
            return bool(found) and (found != ["metadata.parquet"] or not holds(path, IMAGES.fits))
        return bool(_HUB_ID.fullmatch(path)) or is_shard(path)

    def open(self, request: SourceRequest) -> Source:
        """Index the shards, or read the index that the run's folder keeps."""
        from dinov2.data.parquet.source import ParquetSource
        from dinov2.data.storage.locate import open_storage

        refuse_groups(request)
        data = request.config.data
        storage = open_storage(request.path, request.revision, 60 * data.outage_minutes, train_only=True)
        return ParquetSource(storage, request.cache, data.image_column)
