"""Probes by name with their numbers, and all of them on all tasks, over all processes."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from torch import nn

from dinov2.configs.fields import key, key_of
from dinov2.distributed import broadcast_object, get_global_rank, get_global_size
from dinov2.eval.datasets.images import TileImages
from dinov2.eval.datasets.labels import GROUPINGS, LabelledTiles
from dinov2.eval.features import Embedding, device_of, extract_features
from dinov2.eval.probe.compare import compare
from dinov2.eval.probe.results import Result, as_metrics
from dinov2.eval.probe.task import Probe, TaskFeatures
from dinov2.extensions import PROBES

AGGREGATIONS = ("features", "probabilities")
_TOGETHER = {"linear": ("linear_eva", "linear_kaiko")}


@dataclass(frozen=True)
class Probing:
    """Probes and their options; ValueError if a name is unknown or a number out of range."""

    probes: tuple[str, ...] = tuple(PROBES)  # names; linear is both linear ones
    options: Mapping[str, Any] = field(default_factory=dict)  # instances of `Options` by probe; others keep defaults
    folds: int = key(5, "where tiles have no split", least=2)
    group: str | None = None  # one of GROUPINGS, never parted by folds and drawn whole; None takes the widest known
    aggregation: str = "features"  # with labels per slide: mean of a slide's features, or of its tiles' probabilities
    resamples: int = key(1000, "of the bootstrap; 0 leaves intervals out", least=0)
    limit: int | None = key(None, "tiles taken of each split, at most", least=1)
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        probe_names(self.probes)
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"Aggregation {self.aggregation!r} is none of {', '.join(AGGREGATIONS)}.")
        if self.group not in (None, *GROUPINGS):
            raise ValueError(f"Group {self.group!r} is none of {', '.join(GROUPINGS)}.")
        for numbers in (self, *self.options.values()):
            for number in fields(numbers):
                if not key_of(number).accepts(value := getattr(numbers, number.name)):
                    raise ValueError(f"{number.name} is {value}; values{key_of(number).interval()} are accepted.")

    def build(self) -> list[Probe]:
        """The probes, ready to measure."""
        return [PROBES[name](self.options.get(name)) for name in probe_names(self.probes)]


def probe_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names in `PROBES`, each once, for names of which some stand for several; ValueError if one is unknown."""
    each = dict.fromkeys(name for given in names for name in _TOGETHER.get(given, (given,)))
    if problem := next(filter(None, map(PROBES.problem, each)), None):
        raise ValueError(problem)
    return tuple(each)


def option_flags() -> dict[str, tuple[Field[Any], list[str]]]:
    """Names under which a command line sets options: the field, and the probes that it is set for.

    Probes that have an option of one name and default share it; otherwise the later one's is called after the probe.
    """
    flags: dict[str, tuple[Field[Any], list[str]]] = {}
    for name, probe in PROBES.items():
        for option in fields(probe.Options):
            same = option.name not in flags or flags[option.name][0].default == option.default
            flag = option.name if same else f"{name}_{option.name}"
            flags.setdefault(flag, (option, []))[1].append(name)
    return flags


def options_for(**values: Any) -> dict[str, Any]:
    """Options of all registered probes with some values of `option_flags` changed; TypeError if there is no such."""
    changed: dict[str, dict[str, Any]] = {name: {} for name in PROBES}
    flags = option_flags()
    for flag, value in values.items():
        if flag not in flags:
            raise TypeError(f"No probe has the option {flag!r}; known are {', '.join(flags)}.")
        option, probes = flags[flag]
        for name in probes:
            changed[name][option.name] = value
    return {name: PROBES[name].Options(**own) for name, own in changed.items()}


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
