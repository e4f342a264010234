"""Registries: parts by name, imported when asked for."""

import subprocess
import sys

import pytest

from dinov2 import extensions
from dinov2.utils.registry import Registry

FRUIT = Registry("fruit", {"decoder": "json:JSONDecoder", "missing": "no_such_package:thing"})


def test_a_part_is_imported_by_its_name():
    import json

    assert FRUIT["decoder"] is json.JSONDecoder
    assert list(FRUIT) == ["decoder", "missing"] and "decoder" in FRUIT


def test_code_elsewhere_is_named_by_its_path():
    import collections

    assert FRUIT["collections:OrderedDict"] is collections.OrderedDict
    assert "collections:OrderedDict" in FRUIT


@pytest.mark.parametrize("name", ["decoders", "apple", "", "a:", ":a", "a b:c", "json.JSONDecoder"])
def test_an_unknown_name_is_told_with_the_known_ones(name: str):
    assert name not in FRUIT
    assert "fruit" in FRUIT.problem(name) and "decoder" in FRUIT.problem(name)
    with pytest.raises(KeyError):
        FRUIT[name]


def test_what_a_part_needs_is_missed_only_where_it_is_used():
    assert "missing" in FRUIT
    with pytest.raises(ImportError):
        FRUIT["missing"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("no_such_module:Part", "no_such_module"),
        ("json.no_such_module:Part", "json.no_such_module"),
        ("json:Part", "Part"),
    ],
)
def test_a_module_elsewhere_that_is_missing(name: str, missing: str):
    with pytest.raises(ImportError) as error:
        FRUIT[name]
    assert missing in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_names_can_be_checked_without_importing_torch():
    program = "import sys, dinov2.extensions; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False False\n"


@pytest.mark.parametrize("table", ["LOSSES", "AUGMENTATIONS", "SOURCES", "BACKBONES", "PROBES"])
def test_everything_registered_can_be_imported(table: str):
    registry = getattr(extensions, table)
    assert len(registry) and all(callable(registry[name]) for name in registry)
