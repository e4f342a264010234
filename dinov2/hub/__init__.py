"""Trained teachers as plain modules."""

from dinov2.hub.teacher import ClassAndMean, FeatureMap, load_teacher

__all__ = ["ClassAndMean", "FeatureMap", "load_teacher"]
