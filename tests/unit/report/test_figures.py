"""Sheets of pictures: colours of feature maps, and which tiles are shown."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dinov2.report.figures import as_png, draw_pca
from dinov2.report.pictures import spread_out, with_tissue


def test_colours_of_feature_maps_stay_when_axes_turn():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 3, 3, 8)) * [8, 6, 4, 0.1, 0.1, 0.1, 0.1, 0.1]
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    tiles = [np.full((9, 9, 3), 200, np.uint8)] * 4
    same, turned = (
        np.asarray(Image.open(io.BytesIO(as_png(draw_pca(tiles, {"first": first, "last": maps})))).convert("RGB"))
        for first in (maps, maps @ turn)
    )
    assert np.abs(same.astype(int) - turned).max() <= 2


def test_shown_tiles_hold_tissue():
    blank, tissue = np.full((8, 8, 3), 240, np.uint8), np.full((8, 8, 3), (180, 60, 120), np.uint8)
    chosen = with_tissue([blank, tissue] * 6, 4)
    assert len(chosen) == 4 and all((tile == tissue).all() for tile in chosen)
    assert len(with_tissue([blank], 4)) == 1


def test_some_of_many_with_both_ends():
    assert spread_out(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread_out([1, 2], 4) == [1, 2]
