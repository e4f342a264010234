"""Collections of images: folders, tables of paths, tar shards, zip archives and HDF5 files."""

import logging
import os
from collections.abc import Sequence

from dinov2.build.sources import is_slide, is_url, refuse_revision
from dinov2.data.images.container import Container
from dinov2.data.images.files import IMAGES
from dinov2.data.images.hdf5 import Hdf5Tiles
from dinov2.data.images.index import load_index
from dinov2.data.images.list import open_image_list
from dinov2.data.images.origins import Origins
from dinov2.data.images.source import ImageSource
from dinov2.data.images.table import file_column, first_rows
from dinov2.data.images.tar import TarShards
from dinov2.data.images.zip import ZipArchives
from dinov2.data.kinds import endings
from dinov2.data.source import Source, SourceRequest
from dinov2.data.storage.base import FileType, Storage, StoredFile
from dinov2.data.storage.locate import open_storage

logger = logging.getLogger(__name__)

_BEGINNING = 1 << 16  # bytes of a table by which it is recognised


class _Files:
    """A kind of which all files are of one type."""

    files: FileType

    def recognises(self, path: str) -> bool:
        """Whether the path is, or holds, a file of the type."""
        return self.files.fits(path) if is_url(path) else any(map(self.files.fits, endings(path)))

    def container(self, request: SourceRequest) -> Container | None:
        """How the files hold images; None if each is one."""
        return None

    def open(self, request: SourceRequest) -> Source:
        """Index the files, or read what the run's folder keeps."""
        data, container = request.config.data, self.container(request)
        storage = open_storage(
            request.path, request.revision, 60 * data.outage_minutes, train_only=True, files=self.files
        )
        return _open(request, storage, storage.list_files(), container)


class ImageFolder(_Files):
    """Single files of images, at any depth of a folder."""

    accepts = f"a folder of images ({', '.join(ending[1:] for ending in IMAGES.suffixes)}; subfolders are searched)"
    files = IMAGES


class TarFiles(_Files):
    """Tar files in WebDataset's convention."""

    accepts = "tar shards of images as WebDataset has them (.tar; a folder, glob, file or URL of them)"
    files = TarShards.files

    def recognises(self, path: str) -> bool:
        """Whether there are tar files; compressed ones, too, which `open` explains."""
        return super().recognises(path) or any(
            ending.startswith(".tar.") or ending == ".tgz" for ending in endings(path)
        )

    def container(self, request: SourceRequest) -> Container:
        """Tar."""
        return TarShards()

    def open(self, request: SourceRequest) -> Source:
        """See `_Files.open`; ValueError where all tar files are compressed."""
        found = [] if is_url(request.path) else list(endings(request.path))
        if found and not any(map(self.files.fits, found)) and self.recognises(request.path):
            raise ValueError(
                f"The tar files of '{request.path}' are compressed, so that no image can be read by itself; "
                "uncompressed ones are expected (gunzip makes them)."
            )
        return super().open(request)


class ZipFiles(_Files):
    """Zip archives."""

    accepts = "zip archives of images (.zip; a folder, glob, file or URL of them)"
    files = ZipArchives.files

    def container(self, request: SourceRequest) -> Container:
        """Zip."""
        return ZipArchives()


class Hdf5Files(_Files):
    """HDF5 files of tiles."""

    accepts = "HDF5 files of tiles (.h5; a local folder, glob or file of them)"
    files = Hdf5Tiles.files

    def container(self, request: SourceRequest) -> Container:
        """HDF5, with the dataset's name where the configuration has one."""
        return Hdf5Tiles(request.config.data.image_column)


class ImageList:
    """A CSV file that names images."""

    accepts = (
        "a list of images (a CSV file with a column 'file', 'image' or 'path', and perhaps patient, slide, site; or a "
        "text file of paths)"
    )

    def recognises(self, path: str) -> bool:
        """Whether it is a table whose first row names an image that is no slide, by a header or without one."""
        if is_url(path):
            return path.lower().endswith((".csv", ".tsv"))
        path = os.path.expanduser(path.removeprefix("file://"))
        if not path.lower().endswith((".csv", ".tsv", ".txt")) or not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            header, rows = first_rows(file.read(_BEGINNING))
        column = file_column(header)
        for row in rows:
            cells = dict(zip(header, row, strict=False))
            names = [cells.get(column, "")] if column else list(filter(IMAGES.fits, row))
            if names and names[0]:
                return IMAGES.fits(names[0]) and self._is_tile(path, names[0])
        return False

    def _is_tile(self, table: str, name: str) -> bool:
        name = os.path.expanduser(name.removeprefix("file://")).replace("\\", "/")
        beside = os.path.join(os.path.dirname(table), name)
        is_table = not table.lower().endswith(".txt")  # other texts list slides, unless the image itself tells
        if not os.path.isfile(beside) and not os.path.isfile(name):
            return is_table and not is_slide(name)
        return not is_slide(beside if os.path.isfile(beside) else name, named=True)

    def open(self, request: SourceRequest) -> Source:
        """Read the table and look up the sizes of its files."""
        refuse_revision(request)
        data = request.config.data
        outage_s = 60 * data.outage_minutes
        storage, files, origins = open_image_list(request.path, outage_s, data.image_column, data.patient_pattern)
        return _open(request, storage, files, None, origins)


def _open(
    request: SourceRequest,
    storage: Storage,
    files: Sequence[StoredFile],
    container: Container | None,
    origins: Origins | None = None,
) -> Source:
    data = request.config.data
    index = load_index(storage, container, files, request.cache, data.image_column)
    source = ImageSource(storage, index, container, origins or Origins(data.patient_pattern), data.groups_file)
    source.check_told()
    source.warn_of_splits()
    if data.validation_fraction:
        _check_patients(request, source)
    return source


def _check_patients(request: SourceRequest, source: ImageSource) -> None:
    """Raise ValueError if nothing tells of which slide any tile is, and say where folders alone do."""
    told, data = source.told_by(), request.config.data
    if told == "nothing":
        raise ValueError(
            f"Nothing tells of which patient the tiles of '{request.path}' are, so that data.validation_fraction = "
            f"{data.validation_fraction} cannot be kept for validation; data.groups_file or data.patient_pattern does."
        )
    if told == "folders":
        logger.warning(
            "dataset '%s': each folder of tiles, or container of them, is taken for one patient; where folders are "
            "classes or a patient has several, data.groups_file or data.patient_pattern tells patients",
            request.path,
        )
