"""YAML text as plain values: numbers as people write them, no duplicate keys, no file that grows when it is read."""

import re
from itertools import chain
from typing import Any

import yaml

_MOST_BYTES = 1 << 17
_MOST_VALUES = 20_000
_MOST_LEVELS = 32
_FLOAT = re.compile(
    r"([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
)
_FLOAT_TAG, _DATE_TAG = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class YamlError(ValueError):
    """Text that cannot be read as YAML; the message lacks the name of the text."""


def parse_yaml(text: str) -> Any:
    """Parse one YAML document; YamlError if it is none, gives a key twice, or is too large or deep with aliases."""
    if len(text) > _MOST_BYTES:
        raise YamlError(f"it has {len(text):,} characters; at most {_MOST_BYTES:,} are expected")
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise YamlError(f"{error.problem or error.context}{position}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as an integer of 5,000 digits
        raise YamlError(" ".join(str(error).split())) from error
    if loader.duplicates:
        raise YamlError("; ".join(loader.duplicates))
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, with limits; ``1e-4`` is a number and a date is a text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []
        self._level = 0
        self._values: dict[int, int] = {}  # of each composed node, those of aliases counted at every use

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose a node, unless it is too deep or holds too much."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {_MOST_LEVELS} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if not is_alias:
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                self._find_duplicates(node)
                children = chain.from_iterable(children)
            self._values[id(node)] = 1 + sum(self._values[id(child)] for child in children)
        elif id(node) not in self._values:
            raise yaml.MarkedYAMLError(problem="an alias refers to what it stands in", problem_mark=mark)
        if self._values[id(node)] > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"it holds more than {_MOST_VALUES:,} values", problem_mark=mark)
        return node

    def _find_duplicates(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if isinstance(name, yaml.ScalarNode) and name.value != "<<":
                if name.value in lines:
                    self.duplicates.append(f"key {name.value} is there twice, in line {lines[name.value]} and {line}")
                lines[name.value] = line


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT_TAG, _DATE_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# Before the integers, whose pattern would take the digits of 1e5 for a text that begins with a number.
for _first in "-+0123456789.":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, (_FLOAT_TAG, _FLOAT))
