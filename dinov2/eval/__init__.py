"""Evaluation of teachers: features of tiles, and what the features are worth."""

from dinov2.eval.datasets.images import read_tiles
from dinov2.eval.features import attention_maps, embed_images, patch_feature_map
from dinov2.eval.probe.spread import mean_cosine, odcorr, rankme, site_leakage

__all__ = [
    "attention_maps",
    "embed_images",
    "mean_cosine",
    "odcorr",
    "patch_feature_map",
    "rankme",
    "read_tiles",
    "site_leakage",
]
