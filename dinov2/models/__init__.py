"""Backbones, how they are built from a configuration, and published weights for them."""

from dinov2.models.build import build_model_from_cfg

__all__ = ["build_model_from_cfg"]
