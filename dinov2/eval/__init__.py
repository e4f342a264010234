"""Evaluation of teachers: features of tiles, and what the features are worth."""

from importlib import import_module
from typing import Any

_NAMES = {
    "dinov2.eval.datasets.images": ("read_tiles",),
    "dinov2.eval.features": ("attention_maps", "embed_images", "patch_feature_map"),
    "dinov2.eval.probe.spread": ("mean_cosine", "odcorr", "rankme", "site_leakage"),
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
