"""Merge and decode a configuration strictly: faults of names, types, ranges and combinations are reported together."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.decode import Decoder
from dinov2.configs.fields import shortened
from dinov2.configs.files import read_layers
from dinov2.configs.older_keys import MODULES, OlderKeys, merge
from dinov2.configs.schema import Config
from dinov2.configs.validate import ConfigError, combination_faults
from dinov2.configs.yaml_text import YamlError, parse_yaml
from dinov2.utils.files import write_text
from dinov2.utils.secrets import hide, hide_urls, public

logger = logging.getLogger("dinov2")


def load_config(config_file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults <- YAML file, if any <- ``section.key=value`` overrides in YAML syntax, and decode the result.

    The file goes over the one that it extends, see `read_layers`, which finds recipes by name too. FileNotFoundError
    if it is not there; ConfigError, which lists all that is wrong, if it does not fit the schema.
    """
    faults: list[str] = []
    layers = [] if config_file is None else read_layers(config_file, faults)
    layers += [_read_override(override, faults) for override in overrides]
    return _decode(layers, faults)


def config_from_mapping(user: Mapping[str, Any] | DictConfig) -> Config:
    """Decode a nested mapping of user values over the defaults; raises ConfigError as `load_config` does."""
    return _decode([OmegaConf.to_container(user) if isinstance(user, DictConfig) else user], [])


def saved_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that some version saved in a checkpoint, in today's keys, as plain values."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    return merge(defaults, OlderKeys().translate(saved))


def trained_config(saved: Mapping[str, Any]) -> Config:
    """The configuration that some version saved in a checkpoint; what came from the environment stays as written."""
    return _decode([saved_config(saved)], [], resolve=False)


def save_config(config: Config, path: Path) -> None:
    """Write the merged configuration as YAML, atomically; an unequal earlier file is kept under its date."""
    text = yaml.safe_dump(public_config(config), sort_keys=False)
    if path.exists():
        if path.read_bytes() == text.encode():
            return
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}.{written}{path.suffix}"))
    write_text(path, text)


def public_config(config: Config) -> dict[str, Any]:
    """A configuration as plain values for files and people, without what is secret (`dinov2.utils.secrets`)."""
    return public(dataclasses.asdict(config))


def _hide_environment(written: Any, resolved: Any) -> None:
    """Show texts that come from the environment as they are written."""
    if isinstance(written, Mapping):
        for key, value in resolved.items():
            _hide_environment(written[key], value)
    elif isinstance(written, list):
        for one, value in zip(written, resolved, strict=True):
            _hide_environment(one, value)
    elif isinstance(resolved, str) and "${oc.env:" in written:
        hide(resolved, written)


def _decode(layers: Iterable[Mapping[str, Any]], faults: list[str], resolve: bool = True) -> Config:
    older, user = OlderKeys(), {}
    for layer in layers:
        user = merge(user, older.translate(layer))
    try:
        if resolve and "${" in str(user):
            written, user = user, OmegaConf.to_container(OmegaConf.create(user), resolve=True)
            _hide_environment(written, user)
    except OmegaConfBaseException as error:
        faults.append(f"The configuration cannot be resolved: {shortened(str(error).splitlines()[0], 300)}.")
    for notice in dict.fromkeys(older.notices):
        logger.info("%s", notice)
    hide_urls([str(user)])
    decoder = Decoder(older.spelled)
    config = decoder.section(Config, user)
    faults += [*older.faults, *decoder.faults]
    if faults:
        raise ConfigError([*faults, *combination_faults(config, 1, decoder.faulty)])
    dtypes = {getattr(getattr(config.compute_precision, n), m).mixed_precision.param_dtype for n, m in MODULES}
    return dataclasses.replace(config, precision=dtypes.pop() if len(dtypes) == 1 else "mixed")


def _read_override(override: str, faults: list[str]) -> Mapping[str, Any]:
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names) or len(names) > 32:
        faults.append(f"Override {shortened(override)} is not of the form section.key=value.")
        return {}
    try:
        value = parse_yaml(text)
    except YamlError as error:
        faults.append(f"Override {shortened(override)} has no value in YAML syntax: {error}.")
        return {}
    for name in reversed(names):
        value = {name: value}
    return value
