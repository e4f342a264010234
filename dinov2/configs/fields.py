"""Fields of configuration sections: type, default, accepted values and one line of documentation in one place."""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from dinov2 import extensions
from dinov2.utils.registry import Registry

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "null"}


@dataclass(frozen=True)
class Key:
    """Properties of a configuration key beside its type and default; bounds of a list hold for each item."""

    doc: str  # one line for the default YAML and the key table of the documentation
    least: float | None = None  # bounds, inclusive
    most: float | None = None
    above: float | None = None  # and exclusive
    below: float | None = None
    is_path: bool = False  # of a file or folder: a leading ~ is the user's home
    # Table in `dinov2.extensions` of which the value is a name. Of a mapping the names are the keys, and the values
    # are decoded by each part's ``Options`` dataclass.
    registry: str = ""
    also: tuple[str, ...] = ()  # names accepted beside those of the registry
    built_in: tuple[str, ...] = ()  # names that a mapping does not take, since sections of their own set them

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type is within the bounds, or a registered name."""
        if isinstance(value, (list, tuple)):
            return all(map(self.accepts, value))
        if self.registry and isinstance(value, str):
            return value in self.also or value in self.parts
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def parts(self) -> Registry:
        """The registry that `registry` names."""
        return getattr(extensions, self.registry)

    def interval(self) -> str:
        """The bounds as `` in [0, 1)``; empty where there are none."""
        ends = (("[{}", self.least), ("({}", self.above), ("{}]", self.most), ("{})", self.below))
        least, above, most, below = (
            "" if end is None else form.format(int(end) if end == int(end) else end) for form, end in ends
        )
        low, high = least or above, most or below
        return f" in {low or '(-inf'}, {high or 'inf)'}" if low or high else ""


def key(default: Any, doc: str, **accepted: Any) -> Any:
    """A dataclass field that is a configuration key; ``accepted`` are fields of `Key`, ``doc`` has no full stop."""
    metadata = {"key": Key(doc, **accepted)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> Key:
    """Properties that a field gives its key; bare where it was not made by `key`."""
    return field.metadata.get("key", Key(""))


def accepted(hint: Any, key: Key, listed: bool = True) -> str:
    """What a key of a type accepts, as ``a whole number in [1, 64]``; registered names, or (not ``listed``) where."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _either([str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in args])
    if origin in (Union, types.UnionType):
        return " or ".join(accepted(arg, key, listed) for arg in args)
    if origin is tuple and dataclasses.is_dataclass(args[0]):
        return f"a list of entries with the keys {', '.join(field.name for field in dataclasses.fields(args[0]))}"
    if origin is tuple and args:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {count}values, each {accepted(args[0], key, listed)}"
    if key.registry:
        names = _either([*key.also, *(key.parts if listed else [f"a name in dinov2.extensions.{key.registry}"])])
        return names if hint is str else f"a mapping from names ({names}) to options"
    if origin is not None or hint is Mapping:
        return "a mapping"
    return _KINDS.get(hint, str(hint)) + (key.interval() if hint in (int, float) else "")


def shortened(value: Any, most: int = 80) -> str:
    """A value as it is quoted in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)
