"""Trained teachers as plain modules."""

from importlib import import_module
from typing import Any

_NAMES = {
    "dinov2.hub.record": ("trained_with",),
    "dinov2.hub.teacher": ("ClassAndMean", "FeatureMap", "load_teacher"),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str) -> Any:
    # Loaded at first use: commands then say their help, or what is wrong with a line, before torch is imported.
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
