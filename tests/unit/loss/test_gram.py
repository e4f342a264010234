"""Gram anchoring against loops in float64, and its weight over the epochs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.configs import ConfigError, load_config, validate
from dinov2.configs.schedule import Schedule
from dinov2.loss import LossContext, StepOutputs
from dinov2.loss.gram import Gram

VIEWS, IMAGES, SIDE, WIDTH = 2, 3, 3, 5
PATCHES = SIDE**2


def make(**options: Any) -> Gram:
    return Gram(Gram.Options(**{"ema_teacher": True} | options), LossContext(WIDTH, 8, 8, epochs=20))


def outputs_of(teacher_side: int = SIDE) -> StepOutputs:
    """Random tokens and masks of three of the six views, the index of which is padded."""
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((VIEWS * IMAGES, PATCHES)) < 0.4)
    masks[::2] = False
    positions = masks.flatten().nonzero().flatten()
    padding = torch.zeros(2, dtype=torch.int64)
    nothing = torch.zeros(())

    def tokens(patches: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=(VIEWS, IMAGES, patches, WIDTH))).float()

    return StepOutputs(
        *[nothing] * 6,
        masks=masks,
        mask_indices=torch.cat([positions, padding]),
        mask_weight=torch.cat([torch.full((len(positions),), 0.2), padding.float()]),
        teacher_temp=0.05,
        kernels=None,
        patch_tokens=tokens(PATCHES).requires_grad_(),
        teacher_patch_tokens=tokens(PATCHES),
        frozen_patch_tokens=tokens(teacher_side**2),
    )


def expected_loss(outputs: StepOutputs, o: Gram.Options, tokens: str | None = None) -> float:
    """The definition, pair by pair."""
    sides = [
        array.detach().double().numpy().reshape(-1, PATCHES, WIDTH)
        for array in (outputs.patch_tokens, outputs.teacher_patch_tokens)
    ]
    masks, tokens = outputs.masks.numpy(), tokens or o.tokens_used
    rows = [
        (view, patch)
        for view in range(VIEWS * IMAGES)
        for patch in range(PATCHES)
        if tokens == "all" or masks[view, patch] == (tokens == "masked")
    ]
    squares = []
    for (view, i), (other, j) in itertools.product(rows, rows):
        if o.img_level and view != other:
            continue
        similarities = []
        for side in sides:
            a, b = side[view, i], side[other, j]
            length = math.sqrt(a @ a) * math.sqrt(b @ b) if o.normalized else 1.0
            similarities.append(a @ b / length)
        ours, theirs = similarities
        if o.remove_neg:
            ours, theirs = max(ours, 0), max(theirs, 0)
        elif o.remove_only_teacher_neg:
            ours, theirs = 0 if ours < 0 and theirs < 0 else ours, max(theirs, 0)
        squares.append((ours - theirs) ** 2)
    return sum(squares) / len(squares)


@pytest.mark.parametrize(
    "options",
    [
        {"img_level": True},
        {},
        {"normalized": False},
        {"img_level": True, "remove_neg": True},
        {"remove_only_teacher_neg": True},
        {"tokens_used": "masked"},
        {"tokens_used": "unmasked", "normalized": False, "remove_only_teacher_neg": True},
    ],
)
def test_equals_the_definition(options: dict[str, Any]):
    term, outputs = make(**options), outputs_of()
    loss = term(outputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), expected_loss(outputs, term.options), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, outputs.patch_tokens)
    used = gradient.flatten(0, 1).abs().sum(-1) > 0
    masks = outputs.masks
    wanted = {"all": torch.ones_like(masks), "masked": masks, "unmasked": ~masks}[term.options.tokens_used]
    assert torch.equal(used, wanted)


def test_computed_in_float32_from_16_bit():
    term, outputs = make(img_level=True), outputs_of()
    half = {name: getattr(outputs, name).bfloat16() for name in ("patch_tokens", "teacher_patch_tokens")}
    outputs = dataclasses.replace(outputs, **half)
    torch.testing.assert_close(term(outputs).item(), expected_loss(outputs, term.options), rtol=1e-5, atol=1e-6)


def test_a_frozen_teacher_is_looked_at_where_it_is():
    term, outputs = make(ema_teacher=False, ckpt="a.pth"), outputs_of()
    swapped = dataclasses.replace(outputs, teacher_patch_tokens=outputs.frozen_patch_tokens)
    torch.testing.assert_close(term(outputs).item(), expected_loss(swapped, term.options), rtol=1e-5, atol=1e-6)
    assert term.has_teacher and not make().has_teacher
    assert term(dataclasses.replace(outputs, frozen_patch_tokens=None)).item() == 0


@pytest.mark.parametrize(("method", "antialias"), [("bicubic", False), ("bilinear", True)])
def test_larger_maps_are_resized_channel_by_channel(method: str, antialias: bool):
    o = {"global_teacher_resize_method": method, "global_teacher_resize_antialias": antialias}
    term, outputs = make(ema_teacher=False, ckpt="a.pth", **o), outputs_of(2 * SIDE)
    resized = torch.empty(VIEWS, IMAGES, PATCHES, WIDTH)
    for view, image, channel in np.ndindex(VIEWS, IMAGES, WIDTH):
        grid = outputs.frozen_patch_tokens[view, image, :, channel].reshape(1, 1, 2 * SIDE, 2 * SIDE)
        small = torch.nn.functional.interpolate(grid, (SIDE, SIDE), mode=method, antialias=antialias)
        resized[view, image, :, channel] = small.flatten()
    same = dataclasses.replace(outputs, teacher_patch_tokens=resized)
    torch.testing.assert_close(term(outputs).item(), expected_loss(same, term.options), rtol=1e-5, atol=1e-6)


def test_figures_of_masked_and_unmasked_patches():
    outputs, term = outputs_of(), make(img_level=True, compute_stats=True)
    found, batch_level = term.figures(outputs), dataclasses.replace(term.options, img_level=False)
    for tokens in ("masked", "unmasked"):
        expected = expected_loss(outputs, batch_level, tokens)
        torch.testing.assert_close(found[f"health/gram_{tokens}"].item(), expected, rtol=1e-5, atol=1e-6)
    assert make().figures(outputs) == {}


def test_weight_by_schedule():
    """DINOv3's ``linear_warmup_cosine_decay`` at the steps of an epoch of 1000."""
    schedule = Schedule(start=1.0, peak=3.0, end=0.5, warmup_epochs=4, cosine_epochs=2)
    steps = 1000
    cosine = 0.5 + 0.5 * 2.5 * (1 + np.cos(np.linspace(0, np.pi, 2 * steps)))
    theirs = np.concatenate([np.linspace(1, 3, 4 * steps, endpoint=False), cosine, np.full(3 * steps, 0.5)])
    term = make(loss_weight_schedule=schedule, weight=7.0)
    ours = [term.weight_at(step / steps) for step in range(9 * steps)]
    np.testing.assert_allclose(ours, theirs, atol=2.5 * np.pi / (4 * steps))
    assert term.weight_at(math.inf) == 0.5
    to_the_end = make(loss_weight_schedule=dataclasses.replace(schedule, cosine_epochs=None))
    assert to_the_end.weight_at(12) == pytest.approx(1.75) and to_the_end.weight_at(20) == 0.5
    stage = make(loss_weight_schedule=Schedule(0.0, 0.0, 2.0, warmup_epochs=10, cosine_epochs=1))
    assert [stage.weight_at(epoch) for epoch in (0, 10, 10.5, 11)] == [0, 0, pytest.approx(1.0), 2.0]
    assert make(weight=0.3).weight_at(5) == 0.3


def test_is_left_out_without_a_weight():
    assert not Gram.Options(weight=0).is_used and not Gram.Options(use_loss=False).is_used
    assert Gram.Options(weight=0, ema_teacher=True, loss_weight_schedule=Schedule(peak=1)).is_used


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.gram.weight=1"], ["no gram teacher", "ema_teacher", "it_load_ema_teacher"]),
        (["losses.gram.ema_teacher=true", "losses.gram.ckpt=a.pth"], ["ema_teacher = true", "ckpt = 'a.pth'"]),
        (["losses.gram.ema_teacher=true", "losses.gram.remove_neg=true", "losses.gram.remove_only_teacher_neg=true"],
         ["remove_neg = true and remove_only_teacher_neg = true"]),
        (["losses.gram.ema_teacher=true", "losses.gram.img_level=true", "losses.gram.tokens_used=masked"],
         ["tokens_used = masked"]),
        (["losses.gram.ema_teacher=true", "losses.gram.ramp_epochs=[0,1]", "losses.gram.loss_weight_schedule.peak=1"],
         ["ramp_epochs = [0.0, 1.0]", "loss_weight_schedule"]),
        (["gram.ckpt=a.pth", "gram.update_frequency=0"],
         ["losses.gram.update_frequency (given as gram.update_frequency) = 0 is out of range"]),
        (["gram.ckpt=a.pth", "gram.tokens_used=some"], ["all, masked or unmasked"]),
        (["gram.ckpt=a.pth", "crops.gram_teacher_crops_size=448"],
         ["crops.gram_teacher_crops_size = 448", "crops.gram_teacher_no_distortions = false", "null"]),
        (["gram.ckpt=a.pth", "crops.gram_teacher_crops_size=450", "crops.gram_teacher_no_distortions=true"],
         ["crops.gram_teacher_crops_size = 450", "448 or 462"]),
        (["gram.ckpt=a.pth", "crops.gram_teacher_no_distortions=true"], ["crops.gram_teacher_crops_size"]),
        (["crops.gram_teacher_crops_size=448"], ["crops.gram_teacher_crops_size = 448", "losses.gram"]),
        (["gram.ema_teacher=true", "crops.gram_teacher_crops_size=448"], ["ema_teacher: false"]),
    ],
)  # fmt: skip
def test_keys_that_contradict(overrides: list[str], words: list[str]):
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, ["data.path=tiles", *overrides]), 1)
    (fault,) = caught.value.faults
    assert [word for word in words if word not in fault] == []


def test_keys_of_dinov3_as_they_stand(tmp_path):
    """Section ``gram`` and its crops of the 7B's anchoring stage, and of files without it."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {path: tiles}\n"
        "student: {patch_size: 16}\n"
        "gram: {use_loss: true, compute_stats: false, loss_weight: 1.0, ema_teacher: false, ckpt: weights.pth,\n"
        "  it_load_ema_teacher: -1, rep_update: true, update_frequency: 10000, it_first_update: 1010000,\n"
        "  max_updates: 3, normalized: true, img_level: true, remove_neg: false, remove_only_teacher_neg: false,\n"
        "  tokens_used: all, global_teacher_resize_method: bicubic, global_teacher_resize_antialias: false,\n"
        "  loss_weight_schedule: {start: 0, peak: 0, end: 2.0, warmup_epochs: 1000, cosine_epochs: 1}}\n"
        "crops: {global_crops_size: 256, local_crops_size: 112, gram_teacher_crops_size: 512,\n"
        "  gram_teacher_no_distortions: true}\n"
    )
    schedule = Schedule(0.0, 0.0, 2.0, 1000.0, 1.0)
    expected = Gram.Options(ckpt="weights.pth", update_frequency=10000, it_first_update=1010000, max_updates=3,
                            img_level=True, loss_weight_schedule=schedule)  # fmt: skip
    config = load_config(file)
    assert config.losses == {"gram": expected}
    assert config.crops.gram_views_size == 512
    off = load_config(file, ["gram.use_loss=false", "crops.gram_teacher_crops_size=null"])
    assert not off.losses["gram"].is_used
    defaults = "gram: {use_loss: false, ckpt: null, max_updates: null, loss_weight_schedule: null}\n"
    file.write_text("data: {path: tiles}\ncrops: {gram_teacher_crops_size: null}\n" + defaults)
    assert not load_config(file).losses["gram"].is_used
    again = load_config(file, ["gram.use_loss=true", "gram.ema_teacher=true", "gram.loss_weight=0.1"])
    assert again.losses["gram"] == Gram.Options(0.1, ema_teacher=True)
