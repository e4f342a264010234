"""Backbones and how they are built from a configuration."""

from dinov2.models.backbone import Backbone
from dinov2.models.build import build_model_from_cfg

__all__ = ["Backbone", "build_model_from_cfg"]
