"""Distillation against loops in float64, and the images that its teacher is shown."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.configs import ConfigError, load_config
from dinov2.loss import LossContext, StepOutputs
from dinov2.loss.distillation import Distillation

VIEWS, IMAGES, SIDE, WIDTH, TEACHER_WIDTH = 2, 3, 3, 5, 192
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.3, 0.25)
VIT = {
    "arch": "dinov2.models.vision_transformer:DinoVisionTransformer", "embed_dim": TEACHER_WIDTH, "depth": 1,
    "num_heads": 3, "patch_size": 14, "img_size": 28, "layer_norm_eps": 1e-12,
}  # fmt: skip


def make(**options: Any) -> Distillation:
    torch.manual_seed(0)
    options = {"teacher": "a.pth", "architecture": VIT} | options
    return Distillation(Distillation.Options(**options), LossContext(WIDTH, 8, 8, mean=MEAN, std=STD))


def outputs_of(teacher_patches: Tensor | None = None) -> StepOutputs:
    rng = np.random.default_rng(0)

    def tokens(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=(VIEWS, IMAGES, *shape))).float()

    nothing = torch.zeros(())
    outputs = {
        "class_tokens": tokens(WIDTH).requires_grad_(),
        "patch_tokens": tokens(SIDE**2, WIDTH).requires_grad_(),
        "frozen_class_tokens": tokens(TEACHER_WIDTH),
        "frozen_patch_tokens": tokens(SIDE**2, TEACHER_WIDTH) if teacher_patches is None else teacher_patches,
    }
    others = "teacher_class_tokens", "class_logits", "class_targets", "patch_logits", "patch_targets", "masks"
    return StepOutputs(
        **dict.fromkeys((*others, "mask_indices", "mask_weight"), nothing), teacher_temp=0.05, kernels=None, **outputs
    )


def expected(term: Distillation, outputs: StepOutputs, name: str, distance: str) -> float:
    """The definition, token by token."""
    layer = term.projections[name]
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    x = getattr(outputs, f"{name}_tokens").detach().double().numpy().reshape(-1, WIDTH)
    t = getattr(outputs, f"frozen_{name}_tokens").double().numpy().reshape(-1, TEACHER_WIDTH)
    total = 0.0
    for ours, theirs in zip(x, t, strict=True):
        projected = [float(row @ ours) + b for row, b in zip(weight, bias, strict=True)]
        if distance == "mse":
            total += sum((p - q) ** 2 for p, q in zip(projected, theirs, strict=True)) / TEACHER_WIDTH
        else:
            lengths = math.sqrt(sum(p * p for p in projected)) * math.sqrt(sum(q * q for q in theirs))
            total += 1 - sum(p * q for p, q in zip(projected, theirs, strict=True)) / lengths
    return total / len(x)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_losses_are_the_mean_distance_of_projected_tokens(distance: str):
    term, outputs = make(distance=distance, weight=2.0, class_weight=3.0, patch_weight=0.5), outputs_of()
    losses = term(outputs)
    assert losses.keys() == {"distillation_class_loss", "distillation_patch_loss"}
    for name in ("class", "patch"):
        found = losses[f"distillation_{name}_loss"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.item(), expected(term, outputs, name, distance), rtol=1e-5, atol=1e-6)
    weights = [term.weight_of(loss, 1.0) for loss in losses]
    assert weights == [6.0, 1.0]
    sum(losses.values()).backward()
    for tensor in (outputs.class_tokens, outputs.patch_tokens, *term.parameters()):
        assert tensor.grad.abs().max() > 0


def test_patches_of_another_grid_are_resized_to_the_students():
    """A map that is linear along both sides stays so, wherever the bicubic kernel does not reach over an edge."""
    token = torch.randn(TEACHER_WIDTH, generator=torch.Generator().manual_seed(0))
    term = make()
    same, finer = (outputs_of(token.expand(VIEWS, IMAGES, side**2, -1)) for side in (SIDE, 7))
    torch.testing.assert_close(term(same)["distillation_patch_loss"], term(finer)["distillation_patch_loss"])
    ramps = [torch.linspace(0.5 / side, 1 - 0.5 / side, side) for side in (SIDE, 3 * SIDE)]
    linear = [(ramp[:, None] + 2 * ramp + 1).flatten()[:, None] * token for ramp in ramps]
    coarse, fine = (term(outputs_of(tokens.expand(VIEWS, IMAGES, -1, -1))) for tokens in linear)
    # Cosines do not see lengths, by which alone these maps differ.
    torch.testing.assert_close(coarse["distillation_patch_loss"], fine["distillation_patch_loss"])


def test_a_part_without_weight_costs_nothing():
    term = make(patch_weight=0)
    assert term(outputs_of()).keys() == {"distillation_class_loss"}
    assert not term.needs and len(list(term.parameters())) == 2


def test_the_teacher_sees_images_as_it_was_trained_on():
    pixels = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return (pixels - mean) / std

    theirs = (0.5, 0.5, 0.5), (0.5, 0.25, 0.5)
    seen = make(normalize_mean=theirs[0], normalize_std=theirs[1]).images({"global_crops": normalized(MEAN, STD)})
    torch.testing.assert_close(seen, normalized(*theirs), rtol=1e-5, atol=1e-5)
    same = normalized(MEAN, STD)
    assert make().images({"global_crops": same}) is same
    assert make(crops_size=14).images({"global_crops": same}).shape == (4, 3, 14, 14)


def test_the_teacher_is_built_as_described():
    teacher = make().build_teacher(None)
    assert (teacher.embed_dim, teacher.patch_size, len(teacher.blocks), teacher.norm.eps) == (192, 14, 1, 1e-12)


@pytest.mark.parametrize(
    "options", ["{}", "{teacher: a.pth, class_weight: 0, patch_weight: 0}", "{teacher: a.pth, distance: far}"]
)
def test_what_cannot_be_is_refused(options: str):
    with pytest.raises(ConfigError, match=r"losses\.distillation"):
        load_config(None, ["data.path=x", f"losses.distillation={options}"])
