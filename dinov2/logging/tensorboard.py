"""TensorBoard as a sink of metrics."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.logging.names import POSITION, grouped
from dinov2.logging.sinks import Exported, Sink
from dinov2.utils.provenance import how_to_install


class TensorBoardSink(Sink):
    """Event files in ``tensorboard/`` of the output folder, one more for each launch; names are grouped; pictures.

    Of steps that a resumed run makes again TensorBoard shows those of the later file. Raises ImportError, with advice,
    if the package is missing.
    """

    takes_exports = True

    def __init__(self, output_dir: Path, project: str, config: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"logging.sinks names tensorboard, which is not installed; {how_to_install('tensorboard')}."
            ) from error
        self._writer = SummaryWriter(str(output_dir / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record's numbers, at its step and wall time."""
        step, when = int(record["step"]), record.get("time", time.time())
        for name, value in record.items():
            if name not in POSITION and isinstance(value, int | float):
                self._writer.add_scalar(grouped(name), value, step, walltime=when)
        self._writer.flush()

    def export(self, exported: Exported) -> None:
        """Write the pictures."""
        import numpy as np
        from PIL import Image

        for name, png in exported.pictures.items():
            image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self._writer.add_image(f"pictures/{name}", image, exported.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
