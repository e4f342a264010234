"""What a decode worker does: stored bytes to an augmented sample."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.sample import DecodeError, EncodedSample, Sample, Source

Transform = Callable[[np.ndarray, int], Any]


class DecodedRows(Dataset):
    """Encoded to augmented samples; a damaged row gives way to the next good one of its row group, wrapping.

    The substitute depends on the dataset only, not on ranks or workers, and is augmented as sample g.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __getitem__(self, encoded: EncodedSample) -> Sample:
        damage = ""
        try:
            image = self._source.decode(encoded)
        except DecodeError as error:
            damage = f"row {encoded.row} of {self._source.describe(encoded.unit)}: {error}"
            encoded, image = self._next_good(encoded, error)
        crops = self._transform(image, encoded.index)
        return Sample(encoded.index, crops, encoded.slide, replaced=bool(damage), damage=damage)

    def _next_good(self, bad: EncodedSample, error: DecodeError) -> tuple[EncodedSample, np.ndarray]:
        count = int(self._source.unit_rows[bad.unit])
        rows = [(bad.row + step) % count for step in range(1, count)]
        for row, (slide, data) in zip(rows, self._source.read(bad.unit, rows), strict=True):
            candidate = dataclasses.replace(bad, row=row, slide=slide, data=data)
            try:
                return candidate, self._source.decode(candidate)
            except DecodeError:
                continue
        raise ValueError(
            f"none of the {count} rows of {self._source.describe(bad.unit)} is an image (row {bad.row}: "
            f"{error}); restore them or train without them"
        )
