"""Evaluation of teachers: features of tiles, and what the features are worth."""

from dinov2.utils.lazy import lazy_names

_NAMES = {
    "dinov2.eval.datasets.images": ("read_tiles",),
    "dinov2.eval.features": ("attention_maps", "embed_images", "patch_feature_map"),
    "dinov2.eval.probe.spread": ("mean_cosine", "odcorr", "rankme", "site_leakage"),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
