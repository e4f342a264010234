"""Trained teachers as plain modules."""

from dinov2.utils.lazy import lazy_names

_NAMES = {
    "dinov2.hub.record": ("trained_with",),
    "dinov2.hub.teacher": ("ClassAndMean", "FeatureMap", "load_teacher"),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
