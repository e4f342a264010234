"""Trained teachers as plain modules."""

from dinov2.hub.teacher import FeatureMap, load_teacher

__all__ = ["FeatureMap", "load_teacher"]
