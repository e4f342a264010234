"""Trained teachers as plain modules."""

from dinov2.hub.teacher import ClassAndMean, FeatureMap, load_teacher
from dinov2.hub.training_record import trained_with

__all__ = ["ClassAndMean", "FeatureMap", "load_teacher", "trained_with"]
