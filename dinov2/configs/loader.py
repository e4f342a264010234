"""Merge and decode a configuration strictly: every unknown key and wrong type is reported, all at once."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.schema import INERT_KEYS, Config
from dinov2.extensions import LOSSES

logger = logging.getLogger("dinov2")

DEFAULTS_FILE = Path(__file__).with_name("ssl_default_config.yaml")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault, one per line."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults <- YAML file <- overrides and decode the result.

    Args:
        config_file: YAML file, or None for the defaults alone.
        overrides: ``section.key=value`` strings, values in YAML syntax.

    Raises:
        FileNotFoundError: the file is not there.
        ConfigError: the YAML cannot be parsed, or keys or values do not fit the schema (all listed).
    """
    user = OmegaConf.create({})
    if config_file is not None:
        user = _read_yaml(Path(config_file))
    malformed = [item for item in overrides if "=" not in item]
    if malformed:
        raise ConfigError([f"Override {item!r} is not of the form section.key=value." for item in malformed])
    try:
        merged = OmegaConf.merge(user, *map(_read_override, overrides))
        mapping = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"The configuration cannot be merged: {str(error).splitlines()[0]}"]) from error
    return config_from_mapping(mapping)


def config_from_mapping(user: Mapping[str, Any] | DictConfig) -> Config:
    """Decode a mapping of user values over the defaults.

    Raises:
        ConfigError: unknown keys or values of the wrong type, all listed with full path and nearest key.
    """
    if isinstance(user, DictConfig):
        user = OmegaConf.to_container(user, resolve=True)
    faults: list[str] = []
    for key in sorted(_leaf_paths(user) & INERT_KEYS.keys()):
        logger.info("Config key %s has no effect: %s.", key, INERT_KEYS[key])
    defaults = OmegaConf.to_container(OmegaConf.load(DEFAULTS_FILE))
    config = _decode_section(Config, user, defaults, "", faults)
    if faults:
        raise ConfigError(faults)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the merged configuration as YAML, atomically; an unequal earlier file is kept under its date."""
    text = yaml.safe_dump(_plain(config), sort_keys=False)
    if path.exists():
        if path.read_bytes() == text.encode():
            return
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}.{written}{path.suffix}"))
    beside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"Config file {str(path)!r} does not exist; give the path of a YAML file.")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError([f"Config file {str(path)!r} is not YAML that can be read: {detail}"]) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError([f"Config file {str(path)!r} holds a list; sections with keys are expected."])
    return loaded


def _read_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        detail = " ".join(str(error).split())
        raise ConfigError([f"Override {override!r} has no value in YAML syntax: {detail}"]) from error


def _decode_section(section: type, user: Any, defaults: Any, path: str, faults: list[str]) -> Any:
    """Build dataclass ``section`` from user values over defaults, appending faults instead of raising."""
    hints = get_type_hints(section)
    if user is None:  # `section:` with nothing under it
        user = {}
    if not isinstance(user, Mapping):
        faults.append(f"{path} = {user!r} is not a section; it holds the keys {', '.join(hints)}.")
        user = {}
    for key in user:
        if key not in hints:
            faults.append(_unknown_key(path, str(key), list(hints)))
    values = {}
    for name, hint in hints.items():
        child = f"{path}.{name}" if path else name
        if get_origin(hint) is Mapping:
            values[name] = _decode_parts(user.get(name) or {}, child, faults)
        elif dataclasses.is_dataclass(hint):
            values[name] = _decode_section(hint, user.get(name), defaults[name], child, faults)
        elif dataclasses.is_dataclass(entry := next(iter(get_args(hint)), None)):
            values[name] = _decode_entries(entry, user.get(name, defaults[name]), child, faults)
        else:
            values[name] = _decode_value(hint, user.get(name, defaults[name]), child, faults)
    return section(**values)


def _decode_parts(user: Any, path: str, faults: list[str]) -> dict[str, Any]:
    """Options of registered losses by name; of a backbone as they are."""
    if path != "losses":
        return dict(user)
    parts = {}
    for name, values in user.items():
        if problem := LOSSES.problem(name):
            faults.append(f"losses.{name}: {problem}")
            continue
        options = LOSSES[name].Options
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        parts[name] = _decode_section(options, values, defaults, f"{path}.{name}", faults)
    return parts


def _decode_entries(entry: type, user: Any, path: str, faults: list[str]) -> tuple[Any, ...]:
    """Build a tuple of dataclass ``entry`` from a list of mappings; the dataclass holds the defaults of its keys."""
    if not isinstance(user, (list, tuple)):
        keys = ", ".join(field.name for field in dataclasses.fields(entry))
        faults.append(f"{path} = {user!r} is not valid; expected a list of entries with the keys {keys}.")
        return ()
    defaults = {field.name: field.default for field in dataclasses.fields(entry)}
    decoded = []
    for number, values in enumerate(user):
        place = f"{path}[{number}]"
        decoded.append(_decode_section(entry, values, defaults, place, faults))
    return tuple(decoded)


def _decode_value(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    try:
        return _convert(hint, value)
    except (TypeError, ValueError, OverflowError):
        faults.append(f"{path} = {value!r} is not valid; expected {_describe(hint)}.")
        return None


def _convert(hint: Any, value: Any) -> Any:
    """Return ``value`` as the hinted type, without lossy coercion; raise TypeError or ValueError otherwise."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not any(value == arg and type(value) is type(arg) for arg in args):  # 1 is not true
            raise ValueError
        return value
    if origin in (Union, types.UnionType):
        return _convert(args[1] if isinstance(value, str) or value is None else args[0], value)
    if hint is types.NoneType:
        if value is not None:
            raise TypeError
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(value) != len(args):
            raise TypeError
        return tuple(_convert(item_hint, item) for item_hint, item in zip(args, value, strict=True))
    if hint is str and value is None:  # `key:` with nothing after it
        return ""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise TypeError
    if (hint is float and not math.isfinite(value)) or (hint is int and abs(value) >= 2**64):
        raise ValueError
    return value


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = [str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in args]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if origin in (Union, types.UnionType):
        return f"{_describe(args[0])} or {_describe(args[1])}"
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {count}values, each {_describe(args[0])}"
    return {
        bool: "true or false",
        int: "a whole number of at most 64 bits",
        float: "a finite number",
        str: "a text",
        types.NoneType: "null",
    }[hint]


def _unknown_key(path: str, key: str, known: list[str]) -> str:
    full = f"{path}.{key}" if path else key
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{path}." if path else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}."
    return f"Unknown config key {full}; {hint}"


def _leaf_paths(mapping: Any, prefix: str = "") -> set[str]:
    if not isinstance(mapping, Mapping):
        return {prefix}
    return {
        path
        for key, value in mapping.items()
        for path in _leaf_paths(value, f"{prefix}.{key}" if prefix else str(key))
    }


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as the dicts and lists that YAML knows."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
