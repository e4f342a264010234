"""Evaluation of teachers: features of tiles, and what the features are worth."""

from dinov2.eval.features import embed_images, patch_feature_map, read_tiles
from dinov2.eval.probe.odcorr import odcorr
from dinov2.eval.probe.rankme import mean_cosine, rankme

__all__ = ["embed_images", "mean_cosine", "odcorr", "patch_feature_map", "rankme", "read_tiles"]
