"""Terms of the objective: built from the configuration, told of the step, added up; one of one's own among them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.configs import Config
from dinov2.extensions import LOSSES
from dinov2.loss import LossTerm, StepOutputs
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.batches import random_batch
from tests.helpers.toys import Discriminator
from tests.helpers.training import tiny_config

OWN = f"{__name__}:Looking"
DISCRIMINATOR = f"{Discriminator.__module__}:{Discriminator.__name__}"


class Guessing(LossTerm):
    """Says a level of chance for one of its two losses."""

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        loss = outputs.class_tokens.square().mean()
        return {"guess_loss": loss, "other_loss": loss}

    def chance(self, outputs: StepOutputs) -> dict[str, float]:
        return {"guess_loss": 2.5}


class Looking(LossTerm):
    """Keeps what it was told; several values, of which one has no gradient."""

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        self.seen = outputs
        return {"first": outputs.class_tokens.square().mean(), "second": outputs.class_targets.new_ones(())}


def arch_of(losses: dict[str, Any], *overrides: str) -> SSLMetaArch:
    torch.manual_seed(0)
    config = tiny_config("student.drop_path_rate=0", *overrides)
    return SSLMetaArch(dataclasses.replace(config, losses=losses)).train()


def losses_of(arch: SSLMetaArch, config: Config | None = None) -> dict[str, Tensor]:
    return arch.compute_losses(random_batch(config or arch.cfg, images=4), 0.05)


def test_a_term_of_ones_own_is_added_with_its_weight_and_changes_no_other():
    expected, found = losses_of(arch_of({})), losses_of(arch_of({OWN: Looking.Options(0.25)}))
    assert found.keys() - expected.keys() == {"first", "second"}
    for name in expected.keys() - {"total_loss"}:
        assert torch.equal(found[name], expected[name]), name
    total = expected["total_loss"] + 0.25 * (found["first"] + found["second"])
    torch.testing.assert_close(found["total_loss"], total)


def test_what_a_term_is_told():
    arch = arch_of({OWN: Looking.Options(1.0)})
    batch = random_batch(arch.cfg, images=4)
    arch.compute_losses(batch, 0.05)
    seen = arch.losses["Looking"].seen
    assert seen.class_tokens.shape == seen.teacher_class_tokens.shape == (2, 4, 128)
    assert seen.class_logits.shape == (2 + 2, 4, 64) and seen.class_targets.shape == (2, 4, 64)
    assert seen.patch_logits.shape == (len(batch["mask_indices"]), 48)
    assert torch.equal(seen.masks, batch["masks"]) and torch.equal(seen.mask_weight, batch["mask_weight"])
    assert seen.patch_tokens is None and seen.teacher_patch_tokens is None
    assert seen.slides == ["slide"] * 4 and torch.equal(seen.indices, torch.arange(4))
    assert torch.equal(seen.slide_ids, batch["slide_ids"]) and seen.teacher_temp == 0.05
    assert seen.class_tokens.requires_grad and not seen.teacher_class_tokens.requires_grad


@pytest.mark.parametrize("packed", [True, False])
def test_patch_tokens_come_where_a_term_needs_them(packed: bool):
    """Masked patches are then those of the whole last block, which is the same up to rounding."""
    switch = f"performance.packed_crops={str(packed).lower()}"
    without = arch_of({}, switch)
    arch = arch_of({DISCRIMINATOR: Discriminator.Options(1.0), OWN: Looking.Options(1.0)}, switch)
    found, expected = losses_of(arch), losses_of(without)
    torch.testing.assert_close(found["ibot_loss"], expected["ibot_loss"])
    seen = arch.losses["Looking"].seen
    assert seen.patch_tokens.shape == seen.teacher_patch_tokens.shape == (2, 4, 16, 128)
    assert seen.patch_tokens.requires_grad and not seen.teacher_patch_tokens.requires_grad


def test_a_term_with_weights_is_trained_and_clipped_by_itself():
    arch = arch_of({DISCRIMINATOR: Discriminator.Options(0.5)})
    assert list(arch.trained) == ["backbone", "dino_head", "ibot_head", "Discriminator"]
    parameters = {p for group in arch.get_params_groups() for p in group["params"]}
    assert parameters == {*arch.student.parameters(), *arch.losses.parameters()}
    losses_of(arch)["total_loss"].backward()
    assert all(parameter.grad.any() for parameter in arch.losses.Discriminator.parameters())
    assert not any(name.startswith("Discriminator") for name in arch.teacher.state_dict())


def test_a_term_of_ones_own_may_say_its_level_of_chance():
    arch = arch_of({f"{__name__}:Guessing": Guessing.Options(0.1), OWN: Looking.Options(1.0)})
    losses_of(arch)
    assert arch.chance.keys() == {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "guess_loss"}
    assert arch.chance["guess_loss"].item() == 2.5


@pytest.mark.parametrize(
    ("ramp", "factors"),
    [
        ((0.0, 0.0), [1, 1, 1, 1, 1]),
        ((1.0, 3.0), [0, 0, 0.25, 1, 1]),
        ((0.0, 6.0), [0, 1 / 6, 0.25, 0.5, 1]),
        ((1.5, 1.5), [0, 0, 1, 1, 1]),
    ],
)
def test_a_weight_rises_between_two_epochs(ramp: tuple[float, float], factors: list[float]):
    arch = arch_of({OWN: Looking.Options(0.5, ramp_epochs=ramp)})
    batch = random_batch(arch.cfg, images=4)
    for epoch, factor in zip((0, 1, 1.5, 3, 6), factors, strict=True):
        losses, rest = arch.compute_losses(batch, 0.05, epoch), arch_of({}).compute_losses(batch, 0.05)
        total = rest["total_loss"] + 0.5 * factor * (losses["first"] + losses["second"])
        torch.testing.assert_close(losses["total_loss"], total)
    after = arch.compute_losses(batch, 0.05)["total_loss"]
    torch.testing.assert_close(after, rest["total_loss"] + 0.5 * (losses["first"] + losses["second"]))


def test_weight_zero_leaves_a_term_out():
    assert list(arch_of({OWN: Looking.Options(0.0)}, "dino.kde_loss_weight=0").losses) == [
        "dino",
        "ibot",
        "koleo",
    ]


@pytest.mark.parametrize("name", ["koleo", "elsewhere.module:dino", "backbone"])
def test_a_name_that_is_taken_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LOSSES._targets, "backbone", OWN)
    with pytest.raises(ValueError, match=rf"losses\.{name}"):
        arch_of({name: Looking.Options(1.0)})


def test_the_local_loss_has_a_weight_of_its_own_over_time():
    """``start``, ``peak`` and ``end``, a further factor of one of the two DINO losses alone."""
    course = ["start: 1", "peak: 0.5", "end: 0", "warmup_epochs: 2", "cosine_epochs: 2"]
    weights = "dino.loss_weight=2", "dino.kde_loss_weight=0", "dino.koleo_loss_weight=0.1"
    arch = arch_of({}, f"dino.local_loss_weight_schedule={{{', '.join(course)}}}", *weights)
    batch = random_batch(arch.cfg, images=4)
    for epoch, factor in ((0, 1), (1, 0.75), (2, 0.5), (3, 0.25), (4, 0), (math.inf, 0)):
        losses = arch.compute_losses(batch, 0.05, epoch)
        others = {"dino_local_crops_loss": 2 * factor, "dino_global_crops_loss": 2, "koleo_loss": 0.1, "ibot_loss": 1}
        expected = sum(others[name] * value for name, value in losses.items() if name != "total_loss")
        torch.testing.assert_close(losses["total_loss"], expected)
