"""All probes on all tasks, over all processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import broadcast_object, get_global_rank, get_global_size
from dinov2.eval.datasets.images import TileImages
from dinov2.eval.datasets.labelled import LabelledTiles
from dinov2.eval.feature_extraction import Embedding, extract_features
from dinov2.eval.probe.bootstrap import Predictions, estimate
from dinov2.eval.probe.few_shot import few_shot_scores
from dinov2.eval.probe.folds import Division, divide
from dinov2.eval.probe.knn import TEMPERATURE, knn_scores
from dinov2.eval.probe.linear import EVA, KAIKO, Protocol, train_heads
from dinov2.eval.probe.odcorr import odcorr
from dinov2.eval.probe.options import Probing
from dinov2.eval.probe.rankme import rankme
from dinov2.eval.probe.results import Result, as_metrics
from dinov2.eval.probe.slides import Rows, pool_predictions, rows_of

logger = logging.getLogger("dinov2")

_LABEL_FREE_ROWS = 2048


def evaluate(
    backbone: Callable[..., Tensor],
    tasks: Mapping[str, LabelledTiles | TileImages],
    embedding: Embedding | None = None,
    probing: Probing | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """`run_probes` as numbers by name: ``task/probe/metric``."""
    return as_metrics(run_probes(backbone, tasks, embedding, probing, device))


def run_probes(
    backbone: Callable[..., Tensor],
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
        tasks: tiles by name; those without labels get RankMe and ODCorr only.
        embedding: from tiles to features; None takes the defaults.
        probing: from features to results; None takes the defaults.
        device: of the backbone and of the probes; None takes that of the backbone's parameters.

    Raises:
        ValueError: on all ranks, where tiles cannot be read, features are not finite, or a task is too small.
    """
    embedding, probing = embedding or Embedding(), probing or Probing()
    device = device or next(iter(backbone.parameters())).device
    results: list[Result] = []
    for name, tiles in tasks.items():
        labelled = isinstance(tiles, LabelledTiles)
        if labelled and probing.limit:
            tiles = tiles.thinned(probing.limit, probing.seed)
        images = tiles.images if labelled else tiles
        features, _ = extract_features(backbone, images, embedding, device, leave_out_damaged=not labelled)
        jobs = _jobs(name, features, tiles if labelled else None, probing, device)
        results += _share_out(jobs)
    return results


def _share_out(jobs: list[Callable[[], list[Result]]]) -> list[Result]:
    """Run the jobs, each on one rank; every rank gets all results in order, or the first error."""
    rank, world = get_global_rank(), get_global_size()
    own: dict[int, list[Result] | Exception] = {}
    for number in range(rank, len(jobs), world):
        try:
            own[number] = jobs[number]()
        except (ValueError, RuntimeError) as error:  # raised on all ranks below, lest they wait for this one
            own[number] = error
    done = {number: found for src in range(world) for number, found in broadcast_object(own, src).items()}
    found = [done[number] for number in range(len(jobs))]
    for outcome in found:
        if isinstance(outcome, Exception):
            raise outcome
    return [result for outcome in found for result in outcome]


def _jobs(
    task: str, features: np.ndarray, tiles: LabelledTiles | None, probing: Probing, device: torch.device
) -> list[Callable[[], list[Result]]]:
    jobs: list[Callable[[], list[Result]]] = []
    held_out = features
    if tiles is not None:
        if tiles.splits is not None:
            held_out = features[np.asarray(tiles.splits) == "test"]
        if set(probing.probes) - {"rankme", "odcorr"}:
            rows = rows_of(tiles, features, probing.group, probing.aggregation)
            divisions = divide(rows.labels, rows.groups, rows.splits, probing.folds, probing.seed)
            jobs = [
                partial(_classify, task, probe, scores, rows, divisions, probing, device)
                for probe, scores in _classifiers(rows, divisions, probing)
            ]
    count = min(len(held_out), _LABEL_FREE_ROWS)
    sample = held_out[np.arange(count) * len(held_out) // count]
    for probe, measure in (("rankme", rankme), ("odcorr", odcorr)):
        if probing.wants(probe):
            jobs.append(partial(_measure, task, probe, measure, sample))
    return jobs


def _measure(
    task: str, probe: str, measure: Callable[[np.ndarray], float], sample: np.ndarray
) -> list[Result]:
    return [Result(task, probe, "value", measure(sample), count=len(sample))]


Scores = Callable[[Rows, Division, int, torch.device], Tensor]
"""Scores float (R, M, C) of a division's M test rows; the number is the fold's."""


def _classifiers(rows: Rows, divisions: list[Division], probing: Probing) -> list[tuple[str, Scores]]:
    classifiers: list[tuple[str, Scores]] = []
    if probing.wants("knn"):
        for vote, temperature in (("", TEMPERATURE), ("_majority", None)):
            classifiers += [(f"knn{k}{vote}", partial(_knn, k, temperature)) for k in probing.ks]
    for name, protocol in (("linear_eva", EVA), ("linear_kaiko", KAIKO)):
        if probing.wants(name):
            classifiers.append((name, partial(_linear, protocol, probing)))
    if probing.wants("few_shot"):
        least = min(np.bincount(rows.labels[d.train], minlength=rows.classes).min() for d in divisions)
        if beyond := [shots for shots in probing.shots if shots > least]:
            logger.warning("Few-shot with %s tiles per class is left out: a class has %d.", beyond, least)
        possible = [shots for shots in probing.shots if shots <= least]
        classifiers += [(f"few_shot{shots}", partial(_few_shot, shots, probing)) for shots in possible]
    return classifiers


def _classify(
    task: str,
    probe: str,
    scores: Scores,
    rows: Rows,
    divisions: list[Division],
    probing: Probing,
    device: torch.device,
) -> list[Result]:
    parts = []
    for fold, division in enumerate(divisions):
        found = scores(rows, division, fold, device).cpu().numpy()
        test = division.test
        part = Predictions(rows.labels[test], found, rows.groups[test])
        parts.append(part if rows.slides is None else pool_predictions(part, rows.slides[test]))
    count, runs = sum(len(part.target) for part in parts), sum(len(part.scores) for part in parts)
    # The nearest of few centroids ranks tiles poorly, and a hundred draws would take long.
    metrics = estimate(parts, probing.resamples, probing.seed, with_auroc=not probe.startswith("few_shot"))
    return [
        Result(task, probe, metric, e.value, e.low, e.high, e.sd, runs, count)
        for metric, e in metrics.items()
    ]


def _tensors(rows: Rows, chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows.features[chosen]).to(device), torch.from_numpy(rows.labels[chosen]).to(
        device
    )


def _knn(
    k: int, temperature: float | None, rows: Rows, parts: Division, fold: int, device: torch.device
) -> Tensor:
    train, labels = _tensors(rows, parts.train, device)
    test, _ = _tensors(rows, parts.test, device)
    return knn_scores(train, labels, test, rows.classes, (k,), temperature)[k][None]


def _few_shot(
    shots: int, probing: Probing, rows: Rows, parts: Division, fold: int, device: torch.device
) -> Tensor:
    train, labels = _tensors(rows, parts.train, device)
    test, _ = _tensors(rows, parts.test, device)
    return few_shot_scores(train, labels, test, rows.classes, shots, probing.draws, probing.seed + fold)


def _linear(
    protocol: Protocol, probing: Probing, rows: Rows, parts: Division, fold: int, device: torch.device
) -> Tensor:
    train, val = _tensors(rows, parts.train, device), _tensors(rows, parts.val, device)
    test, _ = _tensors(rows, parts.test, device)
    protocol = protocol.within(probing.steps)
    seed = probing.seed + fold * probing.runs
    return train_heads(train, val, rows.classes, protocol, probing.runs, seed).scores(test)
