"""Slides for these tests."""

from tests.helpers.slides import (
    demo_slides,
    jpeg2000_slide,
    jpeg_slide,
    make_slide,
    openslide_only,
    sample_list,
    short_list,
    stored_levels,
    train_slide,
)

__all__ = [
    "demo_slides",
    "jpeg2000_slide",
    "jpeg_slide",
    "make_slide",
    "openslide_only",
    "sample_list",
    "short_list",
    "stored_levels",
    "train_slide",
]
