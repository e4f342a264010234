"""Trained teachers as plain modules."""

from dinov2.hub.record import trained_with
from dinov2.hub.teacher import ClassAndMean, FeatureMap, load_teacher

__all__ = ["ClassAndMean", "FeatureMap", "load_teacher", "trained_with"]
