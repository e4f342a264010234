"""Logistic regression on standardised features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dinov2.configs.fields import key
from dinov2.eval.probe.results import Result
from dinov2.eval.probe.task import Fold, Probe, TaskFeatures

if TYPE_CHECKING:
    from torch import Tensor


class Logistic(Probe):
    """scikit-learn's `StandardScaler` and `LogisticRegression`, the same on every call: one run, nothing is chosen."""

    @dataclass(frozen=True)
    class Options:
        """Of `LogisticRegression`, under its names."""

        C: float = key(0.1, "of logistic regression, less is more penalty on its weights", above=0)
        max_iter: int = key(3000, "iterations of logistic regression, at most", least=1)

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Fit on every division and classify."""
        return task.classify("logistic", partial(logistic_scores, c=self.options.C, max_iter=self.options.max_iter))


def logistic_scores(fold: Fold, c: float = 0.1, max_iter: int = 3000) -> Tensor:
    """Class probabilities of the test rows, float (1, M, C); of a class that no row to fit on is of, 0."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, labels = (part.cpu().numpy() for part in fold.fit)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter)).fit(rows, labels)
    known = head.predict_proba(fold.test.cpu().numpy())
    scores = np.zeros((len(known), fold.classes), known.dtype)
    scores[:, head.classes_] = known
    return torch.from_numpy(scores)[None]
