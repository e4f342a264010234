"""The demo's slides: what a reader makes of them, and what they show."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from skimage.color import hed2rgb
from skimage.data import immunohistochemistry

from dinov2.data.slides.tissue import TissueRule
from prepatching_scripts import make_demo_slide


def test_openslide_sees_an_aperio_pyramid(demo_slides: tuple[Path, Path]) -> None:
    for path in demo_slides:
        with openslide.OpenSlide(path) as slide:
            assert slide.properties[openslide.PROPERTY_NAME_VENDOR] == "aperio"
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == 0.25
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == 0.25
            assert float(slide.properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER]) == 40
            assert slide.level_downsamples == (1.0, 2.0, 4.0)
            assert "thumbnail" in slide.associated_images


def test_canvas_is_rejected_and_tissue_accepted(train_slide: Path) -> None:
    with openslide.OpenSlide(train_slide) as slide:
        corner = np.asarray(slide.read_region((0, 0), 0, (224, 224)).convert("RGB"))
        centre = np.asarray(slide.read_region((700, 700), 0, (224, 224)).convert("RGB"))
    assert (corner == 255).all() and TissueRule().fraction(corner) == 0
    assert TissueRule().accepts(centre)


def test_no_tissue_is_in_both_slides() -> None:
    rows = np.arange(immunohistochemistry().shape[0])
    train, holdout = rows[make_demo_slide.TRAIN_ROWS], rows[make_demo_slide.HOLDOUT_ROWS]
    assert len(train) and len(holdout) and not set(train) & set(holdout)


def test_stains_change_their_colours() -> None:
    """Brown DAB turns pink, blue haematoxylin violet, white stays."""
    stains = np.zeros((16, 48, 3))
    stains[:, :16, 2], stains[:, 16:32, 0] = 0.12, 0.06
    image = make_demo_slide.render_haematoxylin_eosin((hed2rgb(stains) * 255).astype(np.uint8))
    pink, violet, white = (image[8, column].astype(int) for column in (4, 24, 44))
    assert pink[0] > pink[2] > pink[1] and pink[1] < 190
    assert violet[2] > violet[0] > violet[1] and violet[1] < 150
    assert (white > 250).all()


def test_slides_are_reproducible_and_never_overwritten(demo_slides: tuple[Path, Path], tmp_path: Path) -> None:
    again = make_demo_slide.make_demo_slides(tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in demo_slides]
    with pytest.raises(FileExistsError, match=r"demo_train.svs' exists already; name another --output-dir"):
        make_demo_slide.make_demo_slides(tmp_path)
    assert make_demo_slide.main(["--output-dir", str(tmp_path)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo_holdout.svs", "demo_train.svs"]
