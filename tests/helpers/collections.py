"""Small collections of numbered tiles (see `tests.helpers.shards`) in every form that they may have."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tests.helpers.shards import encode, tile

SLIDES = [f"TCGA-AA-{number:04d}-01Z-00-DX1" for number in range(5)]


def tiles(count: int, side: int = 0) -> dict[str, bytes]:
    """PNG files by name, dealt out to folders named after slides; with `side` noise of that size."""
    found = {}
    for number in range(count):
        image = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8) if side else tile(number)
        found[f"{SLIDES[number % len(SLIDES)]}/{number:04d}.png"] = encode(image, "png")
    return found


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar file with members in the given order."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip archive with members in the given order."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_hdf5(path: Path, files: Mapping[str, bytes], encoded: bool) -> Path:
    """An HDF5 file of pixels, or of the files' bytes."""
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((len(files), 2))
        if encoded:
            stored = file.create_dataset("patches", (len(files),), h5py.vlen_dtype(np.uint8))
            for number, data in enumerate(files.values()):
                stored[number] = np.frombuffer(data, np.uint8)
        else:
            file["imgs"] = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files.values()])
    return path


def by_slide(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Files of each slide."""
    return {slide: {n: d for n, d in files.items() if n.startswith(slide)} for slide in SLIDES}


def write_collection(kind: str, folder: Path, files: Mapping[str, bytes]) -> str:
    """Write a collection of a kind; returns its path. "hdf5" has pixels, "hdf5-files" encoded tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "images":
        write_folder(folder, files)
    elif kind == "image_list":
        write_folder(folder / "files", files)
        lines = [f'"files/{name}",{name[:12]},site {number % 2}' for number, name in enumerate(files)]
        path = folder / "list.csv"
        path.write_bytes("\r\n".join(["\ufeffimage,patient,site", *lines, ""]).encode())
        return str(path)
    elif kind == "tar":
        for number, names in enumerate((list(files)[::2], list(files)[1::2])):
            write_tar(folder / f"shard-{number}.tar", {name: files[name] for name in names})
    else:
        for slide, own in by_slide(files).items():
            if kind == "zip":
                write_zip(folder / f"{slide}.zip", {name.rpartition("/")[2]: data for name, data in own.items()})
            else:
                write_hdf5(folder / f"{slide}.h5", own, encoded=kind == "hdf5-files")
    return str(folder)


KINDS = ("images", "image_list", "tar", "zip", "hdf5", "hdf5-files")
"""Of `write_collection`."""
