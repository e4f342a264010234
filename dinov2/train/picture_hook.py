"""Pictures of a run for its sinks: augmented crops, and what its teacher makes of some tiles."""

import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dinov2.build.data import OpenData, augmented_batch
from dinov2.configs import Config
from dinov2.distributed import broadcast_object, is_main_process
from dinov2.eval.datasets.images import read_tiles
from dinov2.eval.features import device_of, evaluation_mode, patch_feature_map
from dinov2.logging.sinks import Exported, Sinks
from dinov2.train.exports import export_path
from dinov2.train.hooks import PeriodicHook
from dinov2.train.state import TrainState
from dinov2.train.update.guard import FiniteGuard
from dinov2.utils.dtypes import DTYPES

logger = logging.getLogger("dinov2")

_CANDIDATES = 32  # tiles, of which those with tissue are shown


class PictureHook(PeriodicHook):
    """Hands sinks what belongs to each export: maps of patch features, and the teacher if ``logging`` says so.

    Maps are of the same tiles at every export, below those of earlier ones of this launch. With the first come crops.
    What cannot be drawn is left out with a warning. The sinks are those of rank 0; all ranks must call.
    """

    def __init__(self, period: int, backbone: nn.Module, config: Config, data: OpenData, output_dir: Path, to: Sinks):
        super().__init__(period, self.show)
        self._backbone, self._config, self._data, self._output_dir, self._to = backbone, config, data, output_dir, to
        self._tiles: list[np.ndarray] = []
        self._crops: dict[str, bytes] = {}
        self._maps: dict[str, np.ndarray] = {}

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """Read tiles, before the stream of batches begins."""
        super().on_start(state, guard)
        if self._config.logging.pictures:
            if is_main_process():
                try:
                    self._read()
                except Exception as error:  # of data and drawing alike: they are not worth a run
                    logger.warning("Sinks get no pictures of tiles (%s).", error)
            self._tiles = broadcast_object(self._tiles)

    def _read(self) -> None:
        from dinov2.report.figures import as_png, draw_crops
        from dinov2.report.pictures import SHOWN_TILES, with_tissue

        tiles, batch = augmented_batch(self._config, self._data)
        self._crops = {"crops": as_png(draw_crops(tiles, batch, self._config.student.patch_size))}
        source = next(filter(None, self._data.held_out), self._data.source)
        # Other tiles than these would have to be fetched; of slides they have no number.
        if self._data.num_tiles and not source.is_remote:
            tiles = list(read_tiles(source, _CANDIDATES))
        self._tiles = with_tissue(tiles, SHOWN_TILES)

    def show(self, state: TrainState) -> None:
        """Draw and hand over; all ranks must call."""
        features = self._features() if self._tiles else None
        if not is_main_process():
            return
        pictures = self._crops
        if features is not None:
            pictures = pictures | self._draw(state.step, features)
        teacher = export_path(self._output_dir, state.step) if self._config.logging.upload_teacher else None
        self._to.export(Exported(state.step, pictures, teacher))
        self._crops = {}  # they would be the same

    def _features(self) -> np.ndarray | None:
        from dinov2.report.pictures import map_side

        augmentation = self._config.augmentation
        norm = {"mean": augmentation.normalize_mean, "std": augmentation.normalize_std}
        dtype = self._config.compute_precision.teacher.backbone.mixed_precision.param_dtype
        cast = nullcontext() if dtype == "fp32" else torch.autocast(device_of(self._backbone).type, DTYPES[dtype])
        try:
            with evaluation_mode(self._backbone), cast:
                size = map_side(self._tiles, self._config.student.patch_size)
                return patch_feature_map(self._backbone, self._tiles, size=size, **norm)
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # of a backbone of its own kind
            logger.warning("Patch features cannot be drawn (%s).", error)
            self._tiles = []
        return None

    def _draw(self, step: int, features: np.ndarray) -> dict[str, bytes]:
        from dinov2.report.figures import as_png, draw_pca
        from dinov2.report.pictures import MAX_EXPORTS

        self._maps[f"step {step}"] = features
        if len(self._maps) > MAX_EXPORTS:  # the first and the newest stay
            del self._maps[list(self._maps)[1]]
        try:
            return {"patch_features": as_png(draw_pca(self._tiles, self._maps))}
        except Exception as error:
            logger.warning("Patch features cannot be drawn (%s).", error)
        return {}
