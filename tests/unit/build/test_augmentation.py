"""Steps, augmentation and batches as a configuration states them."""

import dataclasses

import pytest
import torch
from skimage.data import immunohistochemistry

from dinov2.build.augmentation import build_augmentation, build_collate, build_steps, device_batches
from dinov2.configs import ConfigError, load_config
from dinov2.configs.schema import AugmentationConfig
from dinov2.extensions import BUILT_IN_STEPS
from tests.helpers.augmentation import DEFAULTS, Tint

TINT, EARLY = "tests.helpers.augmentation:Tint", "tests.helpers.augmentation:EarlyTint"


def with_steps(**steps: Tint.Options) -> AugmentationConfig:
    """The default section with further steps; those that are not registered are named by their location."""
    return dataclasses.replace(DEFAULTS, steps=steps)


def test_the_published_steps_come_in_their_order() -> None:
    assert tuple(build_steps(DEFAULTS)) == BUILT_IN_STEPS


def test_further_steps_come_last_or_where_they_say() -> None:
    section = with_steps(**{TINT: Tint.Options(0.5), EARLY: Tint.Options()})
    steps = build_steps(section)
    assert list(steps) == ["flips", "hed", "jitter", EARLY, "grayscale", "blur", TINT]
    assert steps[TINT].options == Tint.Options(0.5)


def test_a_built_in_step_is_not_set_twice() -> None:
    with pytest.raises(ConfigError, match=r"augmentation\.steps\.hed is a built-in augmentation step"):
        load_config(None, ["data.path=x", "augmentation.steps={hed: {}}"])


def test_further_steps_are_configured_by_their_own_keys() -> None:
    config = load_config(None, [f"augmentation.steps={{'{TINT}': {{prob: 0.25}}}}"])
    assert build_steps(config.augmentation)[TINT].options == Tint.Options(0.25)
    with pytest.raises(ConfigError, match="prob"):
        load_config(None, [f"augmentation.steps={{'{TINT}': {{prob: 1.25}}}}"])


def test_a_further_step_takes_effect_and_leaves_the_others() -> None:
    tissue = immunohistochemistry()
    config = load_config(None)
    augment = build_augmentation(dataclasses.replace(config, augmentation=with_steps(**{TINT: Tint.Options()})))
    before, after = build_augmentation(config).sample((512, 512), 3), augment.sample((512, 512), 3)
    assert [view._replace(params=view.params | {TINT: 0}) for view in before] == [
        view._replace(params=view.params | {TINT: 0}) for view in after
    ]
    for crop, view in zip(augment(tissue, 3).global_crops, after, strict=False):
        assert (crop[0] == view.params[TINT]).all()


def test_batches_are_normalised_on_the_device() -> None:
    config = load_config(None)
    crops = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    batch = {"global_crops": crops, "local_crops": crops, "slides": ["a"]}
    (moved,) = device_batches([batch], config, torch.device("cpu"))
    assert moved["slides"] == ["a"]
    for name in ("global_crops", "local_crops"):
        expected = [(1 - m) / s for m, s in zip(DEFAULTS.normalize_mean, DEFAULTS.normalize_std, strict=True)]
        assert moved[name][0, :, 0, 0].tolist() == pytest.approx(expected)


def test_masks_are_those_of_the_section_ibot() -> None:
    config = load_config(None, ["ibot.mask_sample_probability=1", "ibot.mask_ratio_min_max=[0.25,0.25]"])
    assert build_collate(config).max_masked(2) == 4 * 64
