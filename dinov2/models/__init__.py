"""Backbones and how they are built from a configuration."""

from dinov2.models.backbone import Backbone, build_model_from_cfg

__all__ = ["Backbone", "build_model_from_cfg"]
