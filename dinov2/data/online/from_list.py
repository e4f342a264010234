"""Training straight from the slides that a sample list names."""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides import identity
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.find import locate
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.resolution import MPP_TOLERANCE, read_mpp_table
from dinov2.data.slides.sample_list import read_list_description, read_sample_list
from dinov2.data.source import DecodeError, EncodedSample, Origin, as_origins

logger = logging.getLogger(__name__)

GROUP_LINES = 64
_OPEN_SLIDES, _OPENING_THREADS = 64, 16  # per process; each slide keeps a handle and a small tile cache
_SAMPLE_BYTES = 80  # a reference, as it waits in the reader's queue


class SlideListSource:
    """Tiles cut from slides while training, in the order contract of any other source.

    A row group is 64 consecutive lines. Reading a row group gives references; a worker cuts the tile when it decodes
    one. Holds no lock, so it may be forked, pickled and used from several threads.

    Args:
        list_path: `path x y level` lines; x, y are level-0 px and are snapped to the level's own pixel grid. In
            a list of six columns the tile is cut at its mpp from the level that serves it best.
        slide_root: see `locate`.
        tile_size: side of a tile in px of its level, or of its mpp.
        mpp_file, columns: see `read_mpp_table` and `read_sample_list`.
        mpp_tolerance: fraction by which slides may be coarser than the mpp of tiles, unless the list was drawn with
            another.

    FileNotFoundError if the list or a slide of it does not exist, SlideError if a slide cannot be opened for its mpp,
    ValueError if a line is malformed, there is none, or a list of six columns names a slide of unknown mpp.
    """

    is_remote = False

    def __init__(
        self, list_path: str | Path, slide_root: str | Path | None = None, tile_size: int = 224,
        mpp_file: str | Path | None = None, columns: int | None = None, mpp_tolerance: float = MPP_TOLERANCE,
    ) -> None:  # fmt: skip
        self._list_path, self._tile_size = Path(list_path), tile_size
        self._samples = read_sample_list(list_path, columns)
        self._paths = {name: Path(locate(name, list_path, slide_root)) for name in self._samples.slides}
        missing = [str(path) for path in self._paths.values() if not path.is_file()]
        if missing:
            lost = f"{len(missing)} of {len(self._paths)} slides of sample list '{list_path}' do not exist"
            raise FileNotFoundError(f"{lost}, the first is '{missing[0]}'; mount them or set data.slide_root.")
        names = {str(path): name for name, path in reversed(self._paths.items())}
        told = identity.slides_and_patients([str(path) for path in self._paths.values()])
        # Under its first name where a list has several for one slide, or for the files of one.
        self._origins = [
            (names[slide], patient) for slide, patient in (told[str(path)] for path in self._paths.values())
        ]
        self.num_rows = len(self._samples)
        starts = np.arange(0, self.num_rows, GROUP_LINES)
        self.group_rows = np.minimum(GROUP_LINES, self.num_rows - starts).astype(np.int64)
        self.group_bytes = self.group_rows * _SAMPLE_BYTES
        self.fingerprint = f"{self._samples.digest()}-{tile_size}"
        self._mpp: dict[str, float] = {}  # that users gave
        self._mpp_tolerance = read_list_description(list_path).get("mpp_tolerance", mpp_tolerance)
        if self._samples.mpp is not None:
            self._mpp = self._given_mpp(mpp_file)
            # Marked, since at earlier commits a slide's own mpp counted more.
            given = json.dumps(["given", sorted(self._mpp.items())] if self._mpp else []).encode()
            self.fingerprint += f"-{hashlib.blake2b(given, digest_size=8).hexdigest()}"
        self._open = lru_cache(_OPEN_SLIDES)(SlideReader)

    def _given_mpp(self, mpp_file: str | Path | None) -> dict[str, float]:
        """Take the mpp of the table, else of the list's description; every other slide must say its own."""
        described = read_list_description(self._list_path).get("slide_mpp")
        given = dict(described or {})
        if mpp_file is not None:
            table = read_mpp_table(mpp_file)
            found = {name: table.get(name, self._paths[name]) for name in self._samples.slides}
            given |= {name: mpp for name, mpp in found.items() if mpp is not None}
        if given:
            told = "%d of %d slides of sample list '%s' have a given mpp, which counts in place of their own."
            logger.info(told, len(given), len(self._samples.slides), self._list_path)
        if described is None:  # else the list was made by a tool that has seen to it
            unsure = [name for name in self._samples.slides if name not in given]
            with ThreadPoolExecutor(_OPENING_THREADS) as pool:
                known = pool.map(lambda name: SlideReader(self._paths[name]).mpp is not None, unsure)
            silent = [name for name, knows in zip(unsure, known, strict=True) if not knows]
            if silent:
                found = f"{len(silent)} slides of sample list '{self._list_path}' do not say their resolution"
                advice = "its six columns need it: name them in a CSV of 'slide,mpp' lines"
                raise ValueError(f"{found}, the first is '{silent[0]}'; {advice}.")
        return given

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        """Give the slide and the reference `x y level [mpp]` of lines of a row group, in the order asked for."""
        samples, read = self._samples, []
        for i in (group * GROUP_LINES + int(row) for row in rows):
            reference = b"%d %d %d" % (samples.x[i], samples.y[i], samples.level[i])
            if samples.mpp is not None:
                reference += b" %r" % float(samples.mpp[i])
            read.append((samples.slides[samples.slide[i]], reference))
        return read

    def decode(self, sample: EncodedSample) -> np.ndarray:
        """Cut the tile that a reference names: uint8 (tile_size, tile_size, 3) RGB; DecodeError says why it cannot."""
        reference, size = sample.data.split(), self._tile_size
        x, y, level = map(int, reference[:3])
        try:
            path, mpp = self._paths[sample.slide], self._mpp.get(sample.slide)
            reader = self._open(path, mpp, mpp_tolerance=self._mpp_tolerance)
            if len(reference) == 4:
                return reader.read_tile(x, y, size, float(reference[3]))
            return reader.read_region(level, *reader.snap(level, x, y), size, size)
        except SlideError as error:
            raise DecodeError(str(error)) from error

    def describe(self, group: int, row: int | None = None) -> str:
        """Name a row group, or one of its tiles, for a message to the user."""
        first = group * GROUP_LINES + 1
        lines = f"tiles {first} to {first + int(self.group_rows[group]) - 1}" if row is None else f"tile {first + row}"
        return f"{lines} of sample list '{self._list_path}'"

    def slides(self, group: int) -> list[str]:
        """Name the slide of every line of a row group."""
        return [origin.slide for origin in self.origins(group)]

    def origins(self, group: int) -> list[Origin]:
        """Slide of every line of a row group, and its patient where it is a DICOM file that tells one."""
        numbers = self._samples.slide[group * GROUP_LINES : (group + 1) * GROUP_LINES]
        return as_origins(*zip(*(self._origins[number] for number in numbers.tolist()), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_open": lru_cache(_OPEN_SLIDES)(SlideReader)}
