"""From plain values to the frozen dataclasses of the schema; every fault is collected, and none ends the decoding."""

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dinov2.configs.fields import Key, accepted, key_of, shortened
from dinov2.configs.older_keys import OLDER_KEYS

_FAULTY = object()
_NoOptions = dataclasses.make_dataclass("_NoOptions", [], frozen=True)  # of a part that takes none


class Decoder:
    """Decodes sections; a value that cannot be used is named, and its default stands in."""

    def __init__(self, spelled: Mapping[str, str]) -> None:
        self.faults: list[str] = []
        self.faulty: set[str] = set()  # paths of the keys whose value is not the user's
        self._spelled = spelled  # by the user: of keys that are named otherwise today

    def section(self, section: type, user: Any, path: str = "") -> Any:
        """Build a dataclass of keys from user values over its defaults; _FAULTY if that cannot be."""
        hints = get_type_hints(section)
        if user is None:  # `section:` with nothing under it
            user = {}
        if not isinstance(user, Mapping):
            self._fault(path, f"{path} = {shortened(user)} is not a section; it holds the keys {', '.join(hints)}.")
            user = {}
        prefix = f"{path}." if path else ""
        for name in user:
            if name not in hints:
                self._unknown(prefix, str(name), list(hints), user)
        values, missing = {}, False
        for field in dataclasses.fields(section):
            hint, child = hints[field.name], prefix + field.name
            is_required = field.default is field.default_factory  # both MISSING
            if field.name in user or dataclasses.is_dataclass(hint):
                value = self._value(hint, key_of(field), user.get(field.name), child)
                if value is not _FAULTY:
                    values[field.name] = value
            elif is_required:
                self._fault(child, f"{child} is missing; expected {accepted(hint, key_of(field))}.")
            missing |= is_required and field.name not in values
        try:
            return _FAULTY if missing else section(**values)
        except ValueError as error:  # the options of a part have a rule of their own
            self._fault(path, f"{path} cannot be used: {str(error).rstrip('.')}.")
            return _FAULTY

    def _value(self, hint: Any, key: Key, value: Any, path: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.section(hint, value, path)
        if get_origin(hint) is Mapping and isinstance(value, Mapping | None):
            return self._parts(value or {}, key, path) if key.registry else dict(value or {})
        entry = next(iter(get_args(hint)), None)
        if dataclasses.is_dataclass(entry) and isinstance(value, (list, tuple)):
            entries = (self.section(entry, item, f"{path}[{number}]") for number, item in enumerate(value))
            return tuple(item for item in entries if item is not _FAULTY)
        try:
            converted = _convert(hint, value)
            problem = "" if key.accepts(converted) else "out of range" if not key.registry else "unknown"
        except (TypeError, ValueError, LookupError, OverflowError):
            problem = "not valid"
        if not problem:
            is_home = key.is_path and converted.startswith("~")
            return os.path.expanduser(converted) if is_home else converted
        if isinstance(value, Mapping) and value:
            problem = f"not a section, so {path}.{next(iter(value))} cannot be set"
        named = f"{path} (given as {self._spelled[path]})" if path in self._spelled else path
        self._fault(path, f"{named} = {shortened(value)} is {problem}; expected {accepted(hint, key)}.")
        return _FAULTY

    def _parts(self, user: Mapping[str, Any], key: Key, path: str) -> dict[str, Any]:
        """Decode the options of registered parts by name."""
        decoded = {}
        for name, values in user.items():
            child = f"{path}.{name}"
            if problem := key.parts.problem(str(name)):
                self._fault(child, f"Unknown config key {child}; {problem[0].lower()}{problem[1:]}")
            elif name in key.built_in:
                self._fault(child, f"{child} is a built-in {key.parts.kind}, which has keys of its own; leave it out.")
            else:
                try:
                    options = getattr(key.parts[name], "Options", _NoOptions)
                except (ImportError, AttributeError) as error:
                    self._fault(child, f"{child} cannot be used: {error}.")
                else:
                    decoded[name] = self.section(options, values, child)
        return {name: options for name, options in decoded.items() if options is not _FAULTY}

    def _unknown(self, prefix: str, name: str, known: list[str], given: Mapping[str, Any]) -> None:
        older = [key.removeprefix(prefix) for key in OLDER_KEYS if prefix and key.startswith(prefix)]
        hint = f"known keys: {', '.join(known)}." if known else "there are no keys here."
        for near in difflib.get_close_matches(name[:100], [*known, *older], n=1, cutoff=0.6):
            hint, meant = f"did you mean {prefix}{near}?", OLDER_KEYS.get(prefix + near)
            if near not in given:  # the value was meant for this key, whose default says nothing of the user's
                self.faulty.add(meant.new if meant else prefix + near)
        name = name if len(name) <= 80 else f"{name[:80]}..."
        self._fault(prefix + name, f"Unknown config key {prefix}{name}; {hint}")

    def _fault(self, path: str, sentence: str) -> None:
        self.faulty.add(path)
        self.faults.append(sentence)


def keys_of(value: Any, path: str = "") -> Iterator[tuple[str, Any, Key, Any]]:
    """Path, type, key and value of every key of a section and those below it, registered parts included."""
    hints = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        child, item = f"{path}.{field.name}" if path else field.name, getattr(value, field.name)
        if not dataclasses.is_dataclass(item):
            yield child, hints[field.name], key_of(field), item
        below = item.items() if isinstance(item, Mapping) else [("", item)]
        for name, section in below:
            if dataclasses.is_dataclass(section):
                yield from keys_of(section, f"{child}.{name}" if name else child)


def _convert(hint: Any, value: Any) -> Any:
    """Return ``value`` as the hinted type, without lossy coercion; raise an error otherwise."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {(type(arg), arg): arg for arg in args}[type(value), value]  # 1 is not true
    if origin in (Union, types.UnionType):
        return _convert(args[1] if isinstance(value, str) or value is None else args[0], value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(hint, item) for hint, item in zip(hints, value, strict=True))
    if hint is str and value is None:  # `key:` with nothing after it
        return ""
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise TypeError
    return value
