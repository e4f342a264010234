"""Probes of the teacher during training."""

import logging
from pathlib import Path

from torch import nn

from dinov2.build.data import OpenData
from dinov2.configs import Config
from dinov2.eval.datasets.benchmarks import BENCHMARKS
from dinov2.eval.datasets.images import ParquetTiles, TileImages
from dinov2.eval.datasets.labels import LabelledTiles, open_labelled_tiles
from dinov2.eval.features import Embedding
from dinov2.eval.probe.options import Probing, options_for, probe_names
from dinov2.eval.probe.results import append_csv, as_metrics
from dinov2.eval.probe.run import run_probes
from dinov2.extensions import PROBES
from dinov2.logging.sinks import Sink
from dinov2.train.hooks import PeriodicHook
from dinov2.train.state import TrainState
from dinov2.train.update.guard import FiniteGuard
from dinov2.utils.dtypes import DTYPES

logger = logging.getLogger("dinov2")

HELD_OUT = "held_out"  # name of the tiles of validation patients, for probes that need no labels
_HELD_OUT_TILES = 2048
_RUNS = 2  # of linear heads, where evaluation.probe_options does not say


class ProbeHook(PeriodicHook):
    """Probes the teacher before the first step, so that the dip after it shows, and then every ``period`` steps.

    Results go to the sink (of rank 0; None elsewhere) as ``task/probe/metric`` and to the CSV ``path``. The tasks
    are those of `open_tasks`.
    """

    def __init__(
        self,
        period: int,
        backbone: nn.Module,
        tasks: dict[str, LabelledTiles | TileImages],
        config: Config,
        path: Path,
        sink: Sink | None,
    ):
        super().__init__(period, self.probe)
        self._backbone, self._tasks, self._path, self._sink = backbone, tasks, path, sink
        augmentation, evaluation = config.augmentation, config.evaluation
        dtype = config.compute_precision.teacher.backbone.mixed_precision.param_dtype
        self._embedding = Embedding(
            size=config.crops.global_crops_size,
            mean=augmentation.normalize_mean,
            std=augmentation.normalize_std,
            autocast=None if dtype == "fp32" else DTYPES[dtype],
        )
        options = options_for(runs=_RUNS) | dict(evaluation.probe_options)
        self._probing = Probing(evaluation.probes, options, limit=evaluation.probe_tiles, seed=config.train.seed)

    def on_start(self, state: TrainState, guard: FiniteGuard) -> None:
        """Probe the starting weights of a new run."""
        super().on_start(state, guard)
        if state.step == 0:
            self.probe(state)

    def probe(self, state: TrainState) -> None:
        """Embed, probe and record; all ranks must call."""
        results = run_probes(self._backbone, self._tasks, self._embedding, self._probing)
        if self._sink is None:
            return
        self._sink.write({"step": state.step, **as_metrics(results)})
        try:
            append_csv(self._path, results, state.step)
        except (OSError, ValueError) as error:  # they are in metrics.jsonl, too
            logger.warning("Probes of step %d are not added to their table (%s); training goes on.", state.step, error)


def open_tasks(config: Config, data: OpenData) -> dict[str, LabelledTiles | TileImages]:
    """The tiles that section ``evaluation`` names, and those of validation patients, by name.

    Raises FileNotFoundError or ValueError if a folder does not hold what is expected, or two tasks have one name.
    """
    evaluation = config.evaluation
    tasks: dict[str, LabelledTiles | TileImages] = {}
    roots = {"bach": evaluation.bach_root, "breakhis": evaluation.breakhis_root, "pcam": evaluation.pcam_root}
    for name, root in roots.items():
        if root and not Path(root).is_dir():
            logger.warning("evaluation.%s_root = %r is no folder; this benchmark is left out.", name, root)
        elif root:
            tasks[name] = BENCHMARKS[name](root)
    for entry in evaluation.labelled:
        name = entry.name or Path(entry.path).name
        if name in tasks or name == HELD_OUT:
            raise ValueError(f"evaluation.labelled names two tasks {name!r}; give each a name of its own.")
        tasks[name] = open_labelled_tiles(entry.path, entry.labels or None)
    held_out = [source for source in data.held_out if source]
    if held_out and not all(PROBES[name].needs_labels for name in probe_names(evaluation.probes)):
        tasks[HELD_OUT] = ParquetTiles(held_out, _HELD_OUT_TILES)
    return tasks
