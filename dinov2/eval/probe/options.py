"""Which probes are run, and with which numbers; known before torch is imported."""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dinov2.configs.fields import key, key_of
from dinov2.eval.datasets.labels import GROUPINGS
from dinov2.extensions import PROBES

if TYPE_CHECKING:
    from dinov2.eval.probe.task import Probe

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

    def build(self) -> "list[Probe]":
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
