"""DICOM slides written by pydicom: headers alone, or whole levels that OpenSlide opens."""

import io
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_TILE = 256


def write_header(path: Path, series: str, *, columns: int = 1024, kind: str = "VOLUME", **fields: str) -> Path:
    """Write one level, or a picture of another kind, without pixels."""
    file = _header(path, series, (columns, columns), kind, fields)
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def write_slide(folder: Path, image: np.ndarray, mpp: float = 0.5, series: str = "1.2.3", **fields: str) -> Path:
    """Write an image as levels 1 and 4 times smaller, `0.dcm` and `1.dcm`; gives the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scale in enumerate((1, 4)):
        level = np.asarray(Image.fromarray(image).reduce(scale))
        height, width = level.shape[:2]
        file = _header(folder / f"{number}.dcm", series, (width, height), "VOLUME", fields)
        file.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
        measures, groups = Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [mpp * scale / 1000] * 2, 0.001
        groups.PixelMeasuresSequence = Sequence([measures])
        file.SharedFunctionalGroupsSequence = Sequence([groups])
        file.DimensionOrganizationType, file.SamplesPerPixel, file.PlanarConfiguration = "TILED_FULL", 3, 0
        file.PhotometricInterpretation, file.Rows, file.Columns = "YBR_FULL_422", _TILE, _TILE
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
        padded = np.pad(level, [(0, -height % _TILE), (0, -width % _TILE), (0, 0)], mode="edge")
        corners = [(y, x) for y in range(0, height, _TILE) for x in range(0, width, _TILE)]
        file.NumberOfFrames = len(corners)
        file.PixelData = encapsulate([_jpeg(padded[y : y + _TILE, x : x + _TILE]) for y, x in corners])
        file["PixelData"].is_undefined_length = True
        file.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder / "0.dcm"


def _header(path: Path, series: str, size: tuple[int, int], kind: str, fields: dict[str, str]) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = _WHOLE_SLIDE, pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = _WHOLE_SLIDE, meta.MediaStorageSOPInstanceUID
    file.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    file.SeriesInstanceUID = series
    file.TotalPixelMatrixColumns, file.TotalPixelMatrixRows = size
    for name, value in {"StudyInstanceUID": "1.2.9", **fields}.items():
        setattr(file, name, value)
    return file


def _jpeg(tile: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "jpeg", quality=95, subsampling="4:2:2")
    return buffer.getvalue()
