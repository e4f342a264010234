"""The work of a decode worker: stored bytes to an augmented sample."""

import dataclasses
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.augment.collate import Sample
from dinov2.data.source import DecodeError, EncodedSample, Source

_UNITS_TRIED = 8  # row groups after one without any image; more in a row are no accident
Transform = Callable[[np.ndarray, int], Any]


class DecodedRows(Dataset):
    """Encoded to augmented samples; a corrupt row gives way to the next good one of its row group, wrapping.

    Where none of the row group is good, it is the first good one of the row groups that follow. The substitute
    depends on the dataset only, not on ranks or workers, and is augmented as sample g.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __getitem__(self, encoded: EncodedSample) -> Sample | Exception:
        """Decode and augment one row; an error that the user can mend is returned, not a worker's traceback."""
        try:
            fault = ""
            try:
                image = self._source.decode(encoded)
            except DecodeError as error:
                fault = f"{self._source.describe(encoded.unit, encoded.row)}: {error}"
                encoded, image = self._next_good(encoded, fault)
            crops = self._transform(image, encoded.index)
        except (ValueError, OSError) as error:
            return error
        return Sample(encoded.index, crops, encoded.slide, bool(fault), fault, unit=encoded.unit, row=encoded.row)

    def _next_good(self, bad: EncodedSample, fault: str) -> tuple[EncodedSample, np.ndarray]:
        source = self._source
        counts, units = source.unit_rows, len(source.unit_rows)  # of an endless source not to be listed
        after = ((bad.unit + step) % units for step in range(1, units))
        following = list(islice((unit for unit in after if counts[unit]), _UNITS_TRIED))
        for unit in [bad.unit, *following]:
            rows = list(range(counts[unit]))
            if unit == bad.unit:
                rows = rows[bad.row + 1 :] + rows[: bad.row]
            for row, (slide, data) in zip(rows, source.read(unit, rows), strict=True):
                candidate = dataclasses.replace(bad, unit=unit, row=row, slide=slide, data=data)
                try:
                    return candidate, source.decode(candidate)
                except DecodeError:
                    continue
        raise ValueError(
            f"none of the {counts[bad.unit]} rows of {source.describe(bad.unit)} is an image ({fault}), nor any of the "
            f"{len(following)} row groups after it; restore them or train without them"
        )
