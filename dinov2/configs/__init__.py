"""Typed run configuration: defaults <- YAML file <- ``section.key=value`` overrides."""

from dinov2.configs.files import recipes
from dinov2.configs.loader import (
    config_from_mapping,
    load_config,
    public_config,
    save_config,
    saved_config,
    trained_config,
)
from dinov2.configs.schema import Config
from dinov2.configs.validate import ConfigError, validate

__all__ = [
    "Config",
    "ConfigError",
    "config_from_mapping",
    "load_config",
    "public_config",
    "recipes",
    "save_config",
    "saved_config",
    "trained_config",
    "validate",
]
