"""All probes on all tasks, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from dinov2.distributed import broadcast_object, get_global_rank, get_global_size
from dinov2.eval.datasets.images import TileImages
from dinov2.eval.datasets.labelled import LabelledTiles
from dinov2.eval.features import Backbone, Embedding, extract_features
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.results import Result, as_metrics
from dinov2.eval.probe.task import TaskFeatures


def evaluate(
    backbone: Backbone,
    tasks: Mapping[str, LabelledTiles | TileImages],
    embedding: Embedding | None = None,
    probing: Probing | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`run_probes` as numbers by name: ``task/probe/metric``."""
    return as_metrics(run_probes(backbone, tasks, embedding, probing, device))


def run_probes(
    backbone: Backbone,
    tasks: Mapping[str, LabelledTiles | TileImages],
    embedding: Embedding | None = None,
    probing: Probing | None = None,
    device: torch.device | None = None,
) -> list[Result]:
    """Embed the tiles of every task and probe the features. All ranks must call, and all return the same.

    Features are computed and probes are run by all ranks together. Nothing global is drawn from or changed: modes
    and random states are as before, and equal seeds give equal results.

    Args:
        backbone: see `extract_features`.
        tasks: tiles by name; those without labels go through the probes that need none.
        embedding: from tiles to features; None takes the defaults.
        probing: from features to results; None takes the defaults.
        device: of the backbone and of the probes; None takes that of the backbone's parameters.

    Raises:
        ValueError: on all ranks, if tiles cannot be read, features are not finite, or a task is too small.
    """
    embedding, probing = embedding or Embedding(), probing or Probing()
    device = device or next(iter(backbone.parameters())).device
    probes, results = probing.build(), []
    for name, tiles in tasks.items():
        labelled = isinstance(tiles, LabelledTiles)
        if labelled and probing.limit:
            tiles = tiles.thinned(probing.limit, probing.seed)
        images = tiles.images if labelled else tiles
        features, _ = extract_features(backbone, images, embedding, device, leave_out_damaged=not labelled)
        task = TaskFeatures(name, features, tiles if labelled else None, probing, device)
        fitting = [probe for probe in probes if labelled or not probe.needs_labels]
        results += _share_out([partial(probe.measure, task) for probe in fitting])
    return results


def _share_out(jobs: list[Callable[[], list[Result]]]) -> list[Result]:
    """Run the jobs, each on one rank; every rank gets all results in order, or the first error."""
    rank, world = get_global_rank(), get_global_size()
    own: dict[int, list[Result] | Exception] = {}
    for number in range(rank, len(jobs), world):
        try:
            own[number] = jobs[number]()
        except Exception as error:  # raised on all ranks below, lest they wait for this one
            own[number] = error
    done = {number: found for src in range(world) for number, found in broadcast_object(own, src).items()}
    found = [done[number] for number in range(len(jobs))]
    for outcome in found:
        if isinstance(outcome, Exception):
            raise outcome
    return [result for outcome in found for result in outcome]
