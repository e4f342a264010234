"""Fields of configuration sections: type, default, accepted range and one line of documentation in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """What is known of a configuration key beside its type and default; bounds of a list hold for each item.

    Attributes:
        doc: one line for the default YAML and the key table of the documentation.
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        ignored: why the key decides nothing here, where older files carry it: what decides instead.
    """

    doc: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    ignored: str = ""

    def problem(self, value: Any) -> str | None:
        """What would be accepted in place of an out-of-range value; None for one that is in range."""
        if isinstance(value, (list, tuple)):
            return next(filter(None, map(self.problem, value)), None)
        if isinstance(value, (bool, str)) or value is None:
            return None
        inside = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return None if inside else self.accepted()

    def accepted(self) -> str:
        """The range in words; empty where every value of the type is accepted."""
        low = (
            f"[{self.least:g}"
            if self.least is not None
            else f"({self.above:g}"
            if self.above is not None
            else ""
        )
        high = (
            f"{self.most:g}]"
            if self.most is not None
            else f"{self.below:g})"
            if self.below is not None
            else ""
        )
        if low and high:
            return f"a number in {low}, {high}"
        if low:
            return f"{self.least:g} or more" if self.least is not None else f"a number above {self.above:g}"
        if high:
            return f"at most {self.most:g}" if self.most is not None else f"a number below {self.below:g}"
        return ""


def key(default: Any, doc: str, **bounds: Any) -> Any:
    """A dataclass field that is a configuration key.

    Args:
        default: of the key; immutable.
        doc: one line, without a full stop.
        **bounds: see `Key`.
    """
    return dataclasses.field(default=default, metadata={"key": Key(doc, **bounds)})
