"""Levels of chance: what the float64 references say of a student whose predictions are uniform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2.configs import load_config
from dinov2.data.augment.collate import padded_mask_index
from dinov2.loss import EAGER, LossContext, LossTerm, StepOutputs, build_terms
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers import loss_reference as reference
from tests.helpers.batches import random_batch
from tests.helpers.runs import TINY

TAU, IMAGES, WIDTH = 0.1, 4, 6


def terms_of(prototypes: tuple[int, int], *overrides: str) -> dict[str, LossTerm]:
    config = load_config(None, ["dino.kde_loss_weight=0.05", *overrides])
    return dict(build_terms(config, LossContext(WIDTH, *prototypes)).items())


def probabilities(*shape: int) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64)).softmax(-1)


def uniform_step(views: int, local: int, prototypes: tuple[int, int], masks: Tensor) -> tuple[StepOutputs, Tensor]:
    """What a student of equal logits leaves, whatever their value; and the targets of all patches (C, N, K')."""
    of_classes, of_patches = prototypes
    index = padded_mask_index(masks, masks.numel() + 3)
    targets = probabilities(*masks.shape, of_patches)
    shape = (views, IMAGES, WIDTH)
    outputs = StepOutputs(
        class_tokens=torch.randn(shape),
        teacher_class_tokens=torch.randn(shape),
        class_logits=torch.full((views + local, IMAGES, of_classes), -0.7),
        class_targets=probabilities(views, IMAGES, of_classes),
        patch_logits=torch.full((len(index["mask_indices"]), of_patches), 0.3),
        patch_targets=targets.flatten(0, 1)[index["mask_indices"]],
        masks=masks,
        mask_indices=index["mask_indices"],
        mask_weight=index["mask_weight"],
        teacher_temp=0.05,
        kernels=EAGER,
    )
    return outputs, targets


@pytest.mark.parametrize(
    ("views", "local", "prototypes", "fraction"),
    [(2, 8, (64, 48), 0.3), (2, 0, (7, 131_072), 0.5), (3, 5, (1000, 2), 0.05), (2, 1, (2, 7), 1.0)],
)
def test_levels_are_the_losses_of_uniform_predictions(
    views: int, local: int, prototypes: tuple[int, int], fraction: float
):
    masks = torch.rand(views * IMAGES, 9) < fraction
    masks[:3] = False  # crops without masks count in the divisor
    outputs, targets = uniform_step(views, local, prototypes, masks)
    students = outputs.class_logits[:views], outputs.class_logits[views:]
    expected = {
        "dino_global_crops_loss": reference.dino_global(students[0], outputs.class_targets, local, TAU),
        "dino_local_crops_loss": reference.dino_local(students[1], outputs.class_targets, TAU) if local else None,
        "ibot_loss": reference.ibot(torch.zeros_like(targets), targets, masks, TAU),
    }
    terms = terms_of(prototypes)
    found = {**terms["dino"].chance(outputs), **terms["ibot"].chance(outputs)}
    assert found.keys() == {name for name, level in expected.items() if level is not None}
    for name, level in found.items():
        assert float(level) == pytest.approx(expected[name].item(), rel=1e-6), name


def test_terms_without_a_level_say_nothing():
    outputs, _ = uniform_step(2, 4, (8, 8), torch.ones(2 * IMAGES, 9, dtype=torch.bool))
    terms = terms_of((8, 8))
    assert {name: bool(term.chance(outputs)) for name, term in terms.items()} == {
        "dino": True, "ibot": True, "kde": False, "koleo": False,
    }  # fmt: skip


def test_a_batch_without_masks_has_the_level_zero():
    outputs, _ = uniform_step(2, 4, (8, 8), torch.zeros(2 * IMAGES, 9, dtype=torch.bool))
    assert float(terms_of((8, 8))["ibot"].chance(outputs)["ibot_loss"]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ibot.separate_head=false", "crops.local_crops_number=5"),
        ("train.centering=centering", "crops.local_crops_number=0"),
        ("ibot.mask_sample_probability=0.75", "ibot.mask_ratio_min_max=[0.3,0.9]", "debug.factored_targets=false"),
    ],
    ids=["recipe", "shared-head", "centering-no-locals", "more-masks"],
)
def test_a_whole_step_of_a_uniform_student_is_at_chance(overrides: tuple[str, ...]):
    arch = SSLMetaArch(load_config(None, [*TINY, *overrides])).train()
    with torch.no_grad():
        for name, module in arch.student.items():
            if name != "backbone":
                module.last_layer.weight_g.zero_()
    losses = arch.compute_losses(random_batch(arch.cfg, images=4), 0.05)
    expected = {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"} & losses.keys()
    assert arch.chance.keys() == expected
    for name, level in arch.chance.items():
        assert level.dtype == torch.float32 and level.shape == ()
        torch.testing.assert_close(losses[name], level, rtol=1e-5, atol=0)
