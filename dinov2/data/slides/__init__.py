"""Whole-slide images: found, indexed, and read exactly or not at all."""
