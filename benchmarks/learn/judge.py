"""What features of labelled tiles are worth, with and without colour, beside two descriptors that nobody trained.

    python -m benchmarks.learn.judge --tiles PATH --output DIR [--held-out FRACTION] [TEACHER.pth ...]

writes one JSON per teacher, named after its weights, and ``baselines.json``; those that are there are kept. Features
are the class token followed by the mean patch token at 224 px. Two heads, five folds that part no photograph
(``patient``): 20 nearest neighbours by cosine, and standardised logistic regression. Each judges the tiles as they are
and grey copies whose histogram is flat, where neither colour nor tone is left to tell classes by.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from skimage.feature import local_binary_pattern
from sklearn.base import ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dinov2.data.source import decode_image
from dinov2.eval.descriptors import colour, flat_grey, texture
from dinov2.eval.features import Embedding, embed_tiles
from dinov2.eval.probe.metrics import Estimate, Predictions, estimate
from dinov2.eval.probe.spread import odcorr, rankme
from dinov2.hub import load_teacher
from dinov2.hub.pixels import centred_square
from dinov2.hub.record import normalisation
from dinov2.logging import setup_logging
from dinov2.utils.cli import run_command
from dinov2.utils.files import write_json

logger = logging.getLogger("dinov2")

COLUMNS = ("image_bytes", "label", "patient")
KINDS = ("as_is", "grey")
HEADS: dict[str, ClassifierMixin] = {
    "knn": make_pipeline(Normalizer(), KNeighborsClassifier(20)),
    "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=3000)),
}
SIZE = 224
_BATCH = 64
_FOLDS = 5


class Tiles(NamedTuple):
    """Decoded tiles, uint8 (H, W, 3) RGB; class and photograph of each, strings (N,)."""

    images: list[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray


def read_tiles(path: str | Path, groups: Sequence[str] | None = None) -> Tiles:
    """Read a Parquet file or folder with the columns `COLUMNS`, or the rows of some photographs.

    Raises:
        ValueError: if a column is missing.
    """
    names = pq.ParquetDataset(path).schema.names
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"{str(path)!r} has no column {missing[0]}; labelled tiles have {', '.join(COLUMNS)}.")
    filters = None if groups is None else [("patient", "in", list(groups))]
    table = pq.read_table(path, columns=list(COLUMNS), filters=filters)
    images = [decode_image(data) for data in table["image_bytes"].to_pylist()]
    return Tiles(images, *(np.array(table[name].to_pylist()) for name in COLUMNS[1:]))


def held_out_groups(groups: np.ndarray, fraction: float) -> np.ndarray:
    """Photographs that are judged and not trained on: a fraction of all, drawn once and for all; sorted."""
    names = np.unique(groups)
    drawn = np.random.default_rng(0).permutation(names)
    return np.sort(drawn[: round(fraction * len(names))])


def interpolated_codes(grey: np.ndarray) -> np.ndarray:
    """Local binary patterns with the neighbours on a circle (Ojala et al. 2002); uint8 (H - 2, W - 2)."""
    return local_binary_pattern(grey, 8, 1)[1:-1, 1:-1].astype(np.uint8)


def interpolated_texture(image: np.ndarray) -> np.ndarray:
    """`texture` by interpolated codes."""
    return texture(image, interpolated_codes)


BASELINES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]] = {
    "colour": (colour, KINDS[:1]),  # of a flat histogram nothing is left
    "LBP": (texture, KINDS),
    "LBP, interpolated": (interpolated_texture, KINDS),
}
"""Descriptors and the kinds of tiles that they say something of. Which LBP is better depends on head and tiles."""


class Folds:
    """Labels and photographs of tiles, divided into folds that part no photograph."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray) -> None:
        self.classes, self.labels = np.unique(labels, return_inverse=True)
        self.groups = np.unique(groups, return_inverse=True)[1]
        splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=0)
        self.parts = list(splitter.split(self.labels, self.labels, self.groups))

    def predict(self, head: ClassifierMixin, features: np.ndarray) -> np.ndarray:
        """Class number of each tile, by a head fitted on the folds without it, int64 (N,)."""
        predicted = np.empty_like(self.labels)
        for train, test in self.parts:
            predicted[test] = clone(head).fit(features[train], self.labels[train]).predict(features[test])
        return predicted

    def accuracy(self, predicted: np.ndarray, resamples: int = 2000) -> Estimate:
        """Mean over folds (and runs) of the balanced accuracy, with its interval over photographs.

        Args:
            predicted: class numbers, int64 (N,), or (R, N) of several runs.
            resamples: of the bootstrap.
        """
        said = np.eye(len(self.classes))[np.atleast_2d(predicted)]
        parts = [Predictions(self.labels[test], said[:, test], self.groups[test]) for _, test in self.parts]
        return estimate(parts, resamples, with_auroc=False)["balanced_accuracy"]


class Judge:
    """Tiles, their grey copies and their folds."""

    def __init__(self, tiles: Tiles, size: int = SIZE, autocast: torch.dtype | None = None) -> None:
        self.folds, self.size, self.autocast = Folds(tiles.labels, tiles.groups), size, autocast
        self.images = {"as_is": tiles.images, "grey": [flat_grey(image) for image in tiles.images]}

    def judge(self, describe: Callable[[list[np.ndarray]], np.ndarray], kinds: Sequence[str] = KINDS) -> dict[str, Any]:
        """Judge features: for each kind of tiles the class numbers that each head says, RankMe, ODCorr and CPU seconds.

        Args:
            describe: tiles to features (N, D).
            kinds: of `KINDS`.
        """
        found: dict[str, Any] = {}
        for kind in kinds:
            start = time.process_time()
            features = describe(self.images[kind])
            described = time.process_time()
            said = {name: self.folds.predict(head, features).tolist() for name, head in HEADS.items()}
            seconds = {"features": described - start, "heads": time.process_time() - described}
            found[kind] = said | {"rankme": rankme(features), "odcorr": odcorr(features), "seconds": seconds}
        return found

    def baselines(self) -> dict[str, Any]:
        """Judge `BASELINES`."""
        return {
            name: self.judge(lambda images, one=describe: np.stack([one(image) for image in images]), kinds)
            for name, (describe, kinds) in BASELINES.items()
        }

    def teacher(self, checkpoint: str | Path) -> dict[str, Any]:
        """Judge a teacher that `load_teacher` opens."""
        mean, std, _ = normalisation(str(checkpoint))
        model, embedding = load_teacher(checkpoint), Embedding("cls_mean", self.size, _BATCH, mean, std, self.autocast)

        def describe(images: list[np.ndarray]) -> np.ndarray:
            batches = (images[first : first + _BATCH] for first in range(0, len(images), _BATCH))
            squares = ([centred_square(image, self.size) for image in batch] for batch in batches)
            return torch.cat([embed_tiles(model, batch, embedding) for batch in squares]).numpy()

        return self.judge(describe)


def weights_name(checkpoint: str | Path) -> str:
    """A name for a teacher's weights: equal ones, such as the random starts of one seed, are judged once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_teacher(checkpoint).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    """Judge what is not judged yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", metavar="TEACHER.pth")
    parser.add_argument("--tiles", required=True, help="Parquet with image_bytes, label and patient")
    parser.add_argument("--output", type=Path, required=True, help="folder of the judgements")
    parser.add_argument("--held-out", type=float, default=0.0, help="judge only this fraction of the photographs")
    parser.add_argument("--image-size", type=int, default=SIZE, help="side in px at which tiles are judged")
    parser.add_argument("--bf16", action="store_true", help="compute features in bf16")
    args = parser.parse_args(argv)
    setup_logging()
    return run_command(lambda: _run(args), logger, resumable=True)


def photographs(tiles: str | Path) -> np.ndarray:
    """Photograph of each row of a file of tiles, strings (N,)."""
    return np.array(pq.read_table(tiles, columns=["patient"])["patient"].to_pylist())


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Callable[[Judge], dict[str, Any]]] = {"baselines": Judge.baselines}
    for teacher in args.teachers:
        wanted[weights_name(teacher)] = lambda judge, teacher=teacher: judge.teacher(teacher)
    wanted = {name: work for name, work in wanted.items() if not (args.output / f"{name}.json").exists()}
    if not wanted:
        return
    judged = held_out_groups(photographs(args.tiles), args.held_out) if args.held_out else None
    judge = Judge(read_tiles(args.tiles, judged), args.image_size, torch.bfloat16 if args.bf16 else None)
    for name, work in wanted.items():
        start = time.perf_counter()
        write_json(args.output / f"{name}.json", work(judge))
        logger.info("Judged %s in %.0f s.", name, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
