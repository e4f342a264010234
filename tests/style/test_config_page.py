"""The default YAML and the key tables of ``docs/config.md`` are what the schema says."""

from dinov2.configs.__main__ import DEFAULTS, PAGE, default_yaml, page


def test_the_default_yaml_is_the_schemas():
    assert DEFAULTS.read_text() == default_yaml()


def test_the_page_lists_every_key_as_the_schema_has_it():
    assert PAGE.read_text() == page()
