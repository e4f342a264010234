"""Configuration files, found by path or as shipped recipes by name, each over the file that it extends."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2.configs.dinov3_keys import is_dinov3, translate
from dinov2.configs.fields import shortened
from dinov2.configs.yaml_text import YamlError, parse_yaml

logger = logging.getLogger("dinov2")

_RECIPES = Path(__file__).with_name("train")
_SWEEPS = Path(__file__).with_name("sweeps")
_DEFAULTS = Path(__file__).with_name("defaults")  # of other codes, as far as they differ from ours
_DINOV3 = _DEFAULTS / "dinov3.yaml"
_META_DATA = re.compile(r"ImageNet(22k)?(:\w+=.*)?")  # how Meta's files name what is trained on


def recipes() -> list[str]:
    """Names of the shipped recipes, which stand for their files."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def sweeps() -> list[str]:
    """Names of the shipped sweeps, which stand for their files."""
    return sorted(path.stem for path in _SWEEPS.glob("*.yaml"))


def read_sweep(name: str | Path, faults: list[str]) -> tuple[Path, Mapping[str, Any]]:
    """Path and values of a sweep's file, given by path or as a shipped one by name; FileNotFoundError without one.

    Adds a sentence to ``faults`` if it cannot be read.
    """
    path = Path(name).expanduser()
    found = _found(path, path, _SWEEPS)
    if found is None:
        known = f"give the path of a YAML file, or a shipped one: {', '.join(sweeps())}."
        raise FileNotFoundError(f"Sweep {str(name)!r} does not exist; {known}")
    return found, _read(found, faults)


def base_of(sweep: Path, name: str) -> str:
    """What a sweep's file calls its base: the path of a file, told relative to it, or the name of a recipe.

    FileNotFoundError if it is neither.
    """
    named = Path(name).expanduser()
    found = _found(sweep.parent / named, named, sweep.parent, _RECIPES)
    if found is None:
        known = f"a YAML file or a recipe is expected: {', '.join(recipes())}."
        raise FileNotFoundError(f"Sweep '{sweep}' has base = {shortened(name)}, which is not there; {known}")
    return found.stem if found.parent == _RECIPES else str(found.resolve())


def read_layers(name: str | Path, faults: list[str]) -> list[Mapping[str, Any]]:
    """The values of a file, behind those of the file that its key ``extends`` names, and so on.

    That is another file, relative to this one, a recipe, or "meta" or "dinov3": the defaults of Meta's DINOv2, which a
    file that trains on Meta's ImageNet extends unless it says otherwise, and those of DINOv3, which a file with keys
    that only DINOv3 has extends likewise. In files over the latter DINOv3's keys are translated. Adds a sentence to
    ``faults`` for each that cannot be read. Raises FileNotFoundError if there is no file, or recipe, of the name given.
    """
    path = Path(name).expanduser()
    found = _found(path, path, _RECIPES)
    if found is None:
        known = f"give the path of a YAML file, or a recipe: {', '.join(recipes())}."
        raise FileNotFoundError(f"Config file {str(name)!r} does not exist; {known}")
    (root, lowest), *above = _layers(found, faults, ())
    if root == _DINOV3:
        return [lowest, *(translate(values, faults) for _, values in above)]
    return [lowest, *(values for _, values in above)]


def _found(path: Path, name: Path, *folders: Path) -> Path | None:
    """The file at a path; else, if ``name`` is a bare one, the YAML file of that name in the first folder with one."""
    inside = (folder / f"{name.name.removesuffix('.yaml')}.yaml" for folder in folders if len(name.parts) == 1)
    return next((file for file in (path, *inside) if file.is_file()), None)


def _layers(path: Path, faults: list[str], above: tuple[Path, ...]) -> list[tuple[Path, Mapping[str, Any]]]:
    values = dict(_read(path, faults))
    base = values.pop("extends", None)
    train = values.get("train")
    data = train.get("dataset_path") if isinstance(train, Mapping) else None
    if base is None and path != _DINOV3 and is_dinov3(values):
        logger.info("%r has keys of DINOv3: it is taken with DINOv3's defaults (extends: dinov3).", str(path))
        base = "dinov3"
    elif base is None and not above and isinstance(data, str) and _META_DATA.fullmatch(data):
        logger.info("%r trains on %s, as Meta's files do: it is taken with Meta's defaults (extends: meta).",
                    str(path), shortened(data))  # fmt: skip
        base = "meta"
    if base is None:
        return [(path, values)]
    named = Path(base).expanduser() if isinstance(base, str) and base else None
    found = named and _found(path.parent / named, named, path.parent, _RECIPES, _DEFAULTS)
    if found is None or found in (path, *above):
        problem = "extends itself by it" if found else "a file, a recipe or meta is expected"
        faults.append(f"Config file {str(path)!r} has extends = {shortened(base)}: {problem}.")
        return [(path, values)]
    return [*_layers(found, faults, (path, *above)), (path, values)]


def _read(path: Path, faults: list[str]) -> Mapping[str, Any]:
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError, OSError) as error:
        faults.append(f"Config file {str(path)!r} is not YAML that can be read: {error}.")
        return {}
    if isinstance(loaded, Mapping | None):
        return loaded or {}
    kind = "a list" if isinstance(loaded, list) else f"the value {shortened(loaded)}"
    faults.append(f"Config file {str(path)!r} holds {kind}; sections with keys are expected.")
    return {}
