"""``docs/config.md`` lists every key with its default."""

import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from dinov2.configs.schema import INERT_KEYS, Config

ROOT = Path(__file__).parents[2]
SECTIONS = {field.name for field in fields(Config)}
MODULES = "compute_precision.{teacher,student}.{backbone,dino_head,ibot_head}."


def leaves(value: Any, path: str) -> dict[str, Any]:
    """Values of a nested mapping by dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, item in value.items() for name, leaf in leaves(item, f"{path}.{key}").items()}


def expand(pattern: str) -> list[str]:
    """``a.{b,c}`` to ``a.b`` and ``a.c``."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(combination) for combination in product(*parts)]


def documented() -> dict[str, Any]:
    """Default of each key in the page's tables."""
    found = {}
    for line in (ROOT / "docs/config.md").read_text().splitlines():
        cells = line.strip("|").split(" | ")
        if not line.startswith("| `") or len(cells) != 4:
            continue
        keys, values = (re.findall(r"`([^`]+)`", cells[column]) for column in (0, 2))
        for key, value in zip(keys, values if len(values) > 1 else values * len(keys), strict=True):
            for name in expand(key if key.split(".")[0] in SECTIONS else MODULES + key):
                assert name not in found, f"{name} is described twice"
                found[name] = yaml.safe_load(value)
    return found


def test_every_key_is_documented_with_its_default_and_no_other_key():
    defaults = yaml.safe_load((ROOT / "dinov2/configs/ssl_default_config.yaml").read_text())
    expected = {name: leaf for key, value in defaults.items() for name, leaf in leaves(value, key).items()}
    assert documented() == expected


def test_keys_without_effect_are_those_of_the_schema():
    section = (ROOT / "docs/config.md").read_text().split("## Keys without effect")[1]
    listed = {name for key in re.findall(r"^\| `([^`]+)`", section, re.M) for name in expand(key)}
    assert listed == {key for key in INERT_KEYS if not key.startswith("compute_precision")}
