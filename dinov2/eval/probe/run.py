"""All probes on all tasks, over all processes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dinov2.distributed import broadcast_object, get_global_rank, get_global_size
from dinov2.eval.datasets.images import TileImages
from dinov2.eval.datasets.labelled import LabelledTiles
from dinov2.eval.features import Embedding, device_of, extract_features
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
) -> list[Result]:
    """Embed the tiles of every task and probe the features. All ranks must call, and all return the same.

    Features are computed and probes are run by all ranks together, on the backbone's device. Nothing global is drawn
    from or changed: modes and random states are as before, and equal seeds give equal results.

    Args:
        backbone: see `extract_features`.
        tasks: tiles by name; those without labels go through the probes that need none.
        embedding, probing: from tiles to features, and to results; None takes the defaults.

    Raises:
        ValueError: on all ranks, if tiles cannot be read, features are not finite, or a task is too small.
    """
    embedding, probing = embedding or Embedding(), probing or Probing()
    probes, results = probing.build(), []
    for name, tiles in tasks.items():
        labelled = isinstance(tiles, LabelledTiles)
        if labelled and probing.limit:
            tiles = tiles.thinned(probing.limit, probing.seed)
        images = tiles.images if labelled else tiles
        features, _ = extract_features(backbone, images, embedding, skip_corrupt=not labelled)
        task = TaskFeatures(name, features, tiles if labelled else None, probing, device_of(backbone))
        results += _share_out([probe for probe in probes if labelled or not probe.needs_labels], task)
    return results


def _share_out(probes: list[Probe], task: TaskFeatures) -> list[Result]:
    """Run each probe on one rank; every rank gets all results in order, or the first error."""
    rank, world = get_global_rank(), get_global_size()
    own: dict[int, list[Result] | Exception] = {}
    for number in range(rank, len(probes), world):
        try:
            own[number] = probes[number].measure(task)
        except Exception as error:  # raised on all ranks below, lest they wait for this one
            own[number] = error
    done = {number: found for src in range(world) for number, found in broadcast_object(own, src).items()}
    results = []
    for number in range(len(probes)):
        if isinstance(done[number], Exception):
            raise done[number]
        results += done[number]
    return results
