"""A sweep's file and the runs that it stands for, checked as a whole before the first of them starts."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from dinov2.configs import Config, ConfigError, load_config, validate
from dinov2.configs.fields import shortened
from dinov2.configs.files import base_of, read_sweep
from dinov2.configs.yaml_text import YamlError, parse_yaml

OPEN = "???"
"""Value of a key that a sweep's file leaves to its user."""

_KEYS = ("base", "overrides", "variants", "seeds", "phases")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"\w+")
_NO_OTHER_WEIGHTS = {"student.pretrained_weights": "", "train.use_pretrained": False}

Overrides = dict[str, Any]
"""Values by ``section.key``, in the order in which they are set."""


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        phase: empty in a sweep without phases.
        overrides: ``section.key=value`` over the base.
        follows: name of the run from whose teacher this one starts; empty for a first one.
    """

    variant: str
    seed: int
    phase: str
    overrides: tuple[str, ...]
    follows: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return run_name(self.variant, self.seed, self.phase)

    @property
    def group(self) -> str:
        """What it shares with the runs of other seeds."""
        return f"{self.variant}, {self.phase}" if self.phase else self.variant


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs are all sound."""

    name: str
    file: Path
    base: str  # recipe or file
    output: Path
    runs: tuple[Run, ...]  # in the order in which they are made
    configs: tuple[Config, ...]  # of each

    @property
    def tasks(self) -> list[list[int]]:
        """Numbers of the runs that depend on each other: of one variant and seed, phase after phase."""
        tasks: dict[tuple[str, int], list[int]] = {}
        for number, run in enumerate(self.runs):
            tasks.setdefault((run.variant, run.seed), []).append(number)
        return list(tasks.values())


def run_name(variant: str, seed: int, phase: str) -> str:
    """Name of a run's folder."""
    return "-".join([variant, f"seed{seed}", *filter(None, [phase])])


def read(
    name: str, output: Path | None = None, further: Sequence[str] = (), seeds: Sequence[int] = (), processes: int = 1
) -> Sweep:
    """Read a sweep's file and check every run that it stands for.

    Values are set in this order, of which the last counts: base, ``overrides``, those ``further`` ones, the variant,
    the phase. ``NAME:section.key=value`` among the further ones belongs to the variant or phase of that name.

    Args:
        name: path of a file, or a shipped one by its name.
        output: folder of the runs; None: ``output_NAME`` here.
        further: overrides of the command line.
        seeds: in place of the file's.
        processes: that train each run.

    Raises:
        FileNotFoundError: if there is no such file, or its base is missing.
        ConfigError: which lists all that is wrong with the file and with the configuration of any run.
    """
    faults: list[str] = []
    file, values = read_sweep(name, faults)
    parts = _Parts(values, faults)
    parts.add(further)
    if faults:
        raise ConfigError(faults)
    base, folder = base_of(file, parts.base), (output or Path(f"output_{file.stem}")).resolve()
    runs = tuple(_runs(parts, tuple(seeds) or parts.seeds, folder, faults))
    configs = _configs(base, runs, processes, faults)
    if faults:
        raise ConfigError(faults)
    shared = [_share_masks(run, config, folder) for run, config in zip(runs, configs, strict=True)]
    runs, configs = zip(*shared, strict=True)
    return Sweep(file.stem, file.resolve(), base, folder, runs, configs)


class _Parts:
    """The values of a sweep's file; what is wrong with them is added to some faults."""

    def __init__(self, values: Mapping[str, Any], faults: list[str]) -> None:
        self._faults = faults
        for key in values:
            if key not in _KEYS:
                near = difflib.get_close_matches(str(key), _KEYS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(_KEYS)}."
                faults.append(f"Unknown key {key} of a sweep; {hint}")
        self.base = values.get("base", "")
        if not isinstance(self.base, str) or not self.base:
            faults.append(f"base = {shortened(self.base)} is not valid; a recipe or a YAML file is expected.")
        self.common = self._overrides("overrides", values.get("overrides"))
        self.variants = self._named("variants", values.get("variants"))
        self.phases = self._named("phases", values.get("phases")) or {"": {}}
        if not self.variants:
            faults.append("variants is empty; a mapping from names to overrides is expected.")
        for name in self.variants.keys() & self.phases.keys():
            faults.append(f"'{name}' names a variant and a phase; give one of them another name.")
        self.seeds = tuple(values.get("seeds", [0])) if isinstance(values.get("seeds", [0]), list) else ()
        whole = all(type(seed) is int and seed >= 0 for seed in self.seeds)
        if not self.seeds or not whole or len(set(self.seeds)) < len(self.seeds):
            given = shortened(values.get("seeds"))
            faults.append(f"seeds = {given} is not valid; a list of different whole numbers is expected.")

    def add(self, further: Sequence[str]) -> None:
        """Add overrides of the command line, to all runs or to a variant or phase."""
        named = self.variants | self.phases
        everywhere: list[str] = []
        for override in further:
            name, colon, rest = override.partition(":")
            if colon and "=" not in name and name in named:
                named[name] |= self._overrides(name, [rest])
            elif colon and "=" not in name and "." not in name:
                self._faults.append(f"'{name}' of {shortened(override)} is none of {', '.join(filter(None, named))}.")
            else:
                everywhere.append(override)
        for key, value in self._overrides("the command line", everywhere).items():
            setting = [name for name, overrides in named.items() if key in overrides]
            if setting:
                self._faults.append(
                    f"{key} of the command line has no effect where {', '.join(setting)} set it themselves; give it to "
                    f"one of them, as {setting[0]}:{key}=VALUE."
                )
            self.common[key] = value

    def _named(self, key: str, value: Any) -> dict[str, Overrides]:
        if not isinstance(value, Mapping | None):
            self._faults.append(
                f"{key} = {shortened(value)} is not valid; a mapping from names to overrides is expected."
            )
            return {}
        for name in value or {}:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                self._faults.append(
                    f"{key} has the name {name!r}; letters, digits and . _ - are accepted, and a text (in quotes)."
                )
        return {str(name): self._overrides(f"{key}.{name}", item) for name, item in (value or {}).items()}

    def _overrides(self, where: str, value: Any) -> Overrides:
        """Overrides given as a mapping, nested or with dotted keys, or as a list of ``section.key=value``."""
        if isinstance(value, Mapping | None):
            found = dict(_flat("", value or {}))
        elif isinstance(value, list) and all(isinstance(item, str) and "=" in item for item in value):
            found = {}
            for key, _, text in (item.partition("=") for item in value):
                try:
                    found[key.strip()] = parse_yaml(text)
                except YamlError as error:
                    self._faults.append(f"{where} has {shortened(key)} without a value in YAML syntax: {error}.")
        else:
            self._faults.append(
                f"{where} = {shortened(value)} is not valid; a mapping of keys, or a list of section.key=value, is "
                "expected."
            )
            found = {}
        for key in ("train.seed", "train.output_dir"):
            if key in found:
                self._faults.append(f"{where} sets {key}, which the sweep decides itself; leave it out.")
        return found


def _flat(prefix: str, value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and item and all(_PART.fullmatch(str(below)) for below in item):
            yield from _flat(f"{prefix}{name}.", item)
        else:
            yield f"{prefix}{name}", item


def _runs(parts: _Parts, seeds: Sequence[int], output: Path, faults: list[str]) -> Iterator[Run]:
    left_open: dict[tuple[str, str], None] = {}
    for variant, seed in product(parts.variants, seeds):
        before = ""
        for phase, of_phase in parts.phases.items():
            merged: dict[str, tuple[str, Any]] = {}  # key to who sets it, and the value
            for name, layer in (("", parts.common), (variant, parts.variants[variant]), (phase, of_phase)):
                for key, value in layer.items():
                    merged.pop(key, None)  # what is set last comes last, or a section could undo it
                    merged[key] = name, value
            left_open |= {(name, key): None for key, (name, value) in merged.items() if value == OPEN}
            values = {key: value for key, (_, value) in merged.items() if value != OPEN}
            if before:
                values |= {**_NO_OTHER_WEIGHTS, "MODEL.WEIGHTS": str(output / before)}
            values["train.seed"] = seed
            overrides = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
            run = Run(variant, seed, phase, overrides, before)
            yield run
            before = run.name
    for name, key in left_open:
        given = f"{name}:{key}" if name else key
        faults.append(f"{name or 'The sweep'} leaves {key} open; give {given}=VALUE.")


def _configs(base: str, runs: Sequence[Run], processes: int, faults: list[str]) -> list[Config]:
    """Configurations of all runs; a fault that several share is named once."""
    configs, named = [], dict[str, list[str]]()
    for run in runs:
        try:
            config = load_config(base, run.overrides)
            validate(config, processes)
            configs.append(config)
        except ConfigError as error:
            for fault in error.faults:
                named.setdefault(fault, []).append(run.group)
    groups = len({run.group for run in runs})
    for fault, where in named.items():
        some = list(dict.fromkeys(where))
        faults.append(fault if len(some) == groups else f"{', '.join(some)}: {fault}")
    if not faults:
        _refuse_twins(runs, configs, faults)
    return configs


def _share_masks(run: Run, config: Config, output: Path) -> tuple[Run, Config]:
    """Let runs that cut tiles from slides share tissue masks and indexes, which take hours for thousands of slides."""
    if config.data.kind != "slides" or config.online.cache_dir:
        return run, config
    cache = str(output / "slide_cache")
    overrides = (*run.overrides, f"online.cache_dir={json.dumps(cache)}")
    online = dataclasses.replace(config.online, cache_dir=cache)
    return dataclasses.replace(run, overrides=overrides), dataclasses.replace(config, online=online)


def _refuse_twins(runs: Sequence[Run], configs: Sequence[Config], faults: list[str]) -> None:
    """Add a fault for each pair of variants that are the same in all phases."""
    whole: dict[str, list[Any]] = {}
    for run, config in zip(runs, configs, strict=True):
        if run.seed == runs[0].seed:
            start = "" if run.follows else config.MODEL.WEIGHTS
            whole.setdefault(run.variant, []).append(dataclasses.asdict(config) | {"MODEL": start})
    for (one, values), (other, its) in combinations(whole.items(), 2):
        if values == its:
            faults.append(f"{one} and {other} are the same configuration; leave one out.")
