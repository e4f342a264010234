"""Which probes are run, and with what numbers."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2.eval.datasets.labelled import GROUPINGS
from dinov2.eval.probe.slides import AGGREGATIONS

PROBES = ("knn", "linear_eva", "linear_kaiko", "few_shot", "rankme", "odcorr")


@dataclass(frozen=True)
class Probing:
    """What is done with features.

    Attributes:
        probes: out of `PROBES`; ``linear`` is both linear ones.
        ks: numbers of neighbours.
        shots: training tiles per class of few-shot; those that a class cannot give are left out.
        draws: of the shots.
        runs: linear heads of different seeds.
        steps: of a linear head, at most.
        folds: where tiles have no split.
        group: ``patient``, ``slide`` or ``tile``, never parted by folds and drawn whole in intervals; None takes the
            widest that is known.
        aggregation: with labels per slide: mean of a slide's ``features``, or of its tiles' ``probabilities``.
        resamples: of the bootstrap; 0 leaves intervals out.
        limit: tiles taken of each split, at most; None takes all.
        seed: of everything random.
    """

    probes: tuple[str, ...] = PROBES
    ks: tuple[int, ...] = (5, 20)
    shots: tuple[int, ...] = (1, 4, 16)
    draws: int = 100
    runs: int = 5
    steps: int = 12_500
    folds: int = 5
    group: str | None = None
    aggregation: str = "features"
    resamples: int = 1000
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*PROBES, "linear")
        if unknown := [name for name in self.probes if name not in known]:
            raise ValueError(f"Probe {unknown[0]!r} is none of {', '.join(known)}.")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"Aggregation {self.aggregation!r} is none of {', '.join(AGGREGATIONS)}.")
        if self.group not in (None, *GROUPINGS):
            raise ValueError(f"Group {self.group!r} is none of {', '.join(GROUPINGS)}.")
        least = {"draws": 1, "runs": 1, "steps": 1, "folds": 2, "resamples": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; at least {value} is needed.")
        if min((*self.ks, *self.shots, self.limit or 1), default=1) < 1:
            raise ValueError("ks, shots and limit must be at least 1.")

    def wants(self, probe: str) -> bool:
        """Whether a probe is chosen."""
        return probe in self.probes or (probe.startswith("linear") and "linear" in self.probes)
