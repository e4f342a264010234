"""Probes on all tasks, over all processes."""

from collections.abc import Mapping

from torch import nn

from dinov2.distributed import broadcast_object, get_global_rank, get_global_size
from dinov2.eval.datasets.images import TileImages
from dinov2.eval.datasets.labels import LabelledTiles
from dinov2.eval.features import Embedding, device_of, extract_features
from dinov2.eval.probe.compare import compare
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.results import Result, as_metrics
from dinov2.eval.probe.task import Probe, TaskFeatures


def evaluate(
    backbone: nn.Module,
    tasks: Mapping[str, LabelledTiles | TileImages],
    embedding: Embedding | None = None,
    probing: Probing | None = None,
) -> dict[str, float]:
    """`run_probes` as numbers by name: ``task/probe/metric``."""
    return as_metrics(run_probes(backbone, tasks, embedding, probing))


def run_probes(
    backbone: nn.Module,
    tasks: Mapping[str, LabelledTiles | TileImages],
    embedding: Embedding | None = None,
    probing: Probing | None = None,
    compared: tuple[nn.Module, Embedding] | None = None,
) -> list[Result]:
    """Embed the tiles of every task and probe the features. All ranks must call, and all return the same.

    Features are computed and probes are run by all ranks together, on the backbone's device. Nothing global is drawn
    from or changed: modes and random states are as before, and equal seeds give equal results. Raises ValueError, on
    all ranks, if tiles cannot be read, features are not finite, or a task is too small.

    Args:
        backbone: see `extract_features`.
        tasks: tiles by name; those without labels go through the probes that need none.
        compared: another backbone, probed on the same divisions of the same tiles; its metrics are added under
            names that begin with ``compared_``, and ``balanced_accuracy_difference`` of each probe.
    """
    probing, results = probing or Probing(), []
    probes, teachers = probing.build(), [(backbone, embedding or Embedding()), *([compared] if compared else [])]
    for name, tiles in tasks.items():
        labelled = isinstance(tiles, LabelledTiles)
        if labelled and probing.limit:
            tiles = tiles.thinned(probing.limit, probing.seed)
        images, labels = (tiles.images, tiles) if labelled else (tiles, None)
        embedded = []
        for model, how in teachers:
            features, _ = extract_features(model, images, how, skip_corrupt=not labelled)
            embedded.append(TaskFeatures(name, features, labels, probing, device_of(model)))
        results += _share_out([probe for probe in probes if labelled or not probe.needs_labels], embedded)
    return results


def _share_out(probes: list[Probe], tasks: list[TaskFeatures]) -> list[Result]:
    """Run each probe on one rank; every rank gets all results in order, or the first error."""
    rank, world = get_global_rank(), get_global_size()
    own: dict[int, list[Result] | Exception] = {}
    for number in range(rank, len(probes), world):
        try:
            own[number] = compare(probes[number], *tasks) if len(tasks) > 1 else probes[number].measure(tasks[0])
        except Exception as error:  # raised on all ranks below, lest they wait for this one
            own[number] = error
    done = {number: found for src in range(world) for number, found in broadcast_object(own, src).items()}
    results = []
    for number in range(len(probes)):
        if isinstance(done[number], Exception):
            raise done[number]
        results += done[number]
    return results
