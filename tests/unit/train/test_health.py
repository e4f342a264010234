"""Figures of health against numpy, and that a step is bit-equal with and without them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dinov2.eval.probe.spread import rankme
from dinov2.loss import sinkhorn_assignments
from dinov2.train import health
from dinov2.train.health import health_of_tokens, target_figures
from tests.helpers.training import differing, make_trainer, random_batches, tiny_config, whole_state

RNG = np.random.default_rng(0)


def expected_figures(p: np.ndarray) -> tuple[float, float]:
    """By scipy, in float64."""
    size = p.shape[1]
    return entropy(p, axis=1).mean() / math.log(size), math.exp(entropy(p.mean(0))) / size


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("tile", [2**22, 70])  # elements: all rows at once, and two by two
def test_figures_of_targets(sharpness: float, tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "_TILE_ELEMENTS", tile)
    logits = torch.from_numpy(RNG.standard_normal((11, 32)) * sharpness).float()
    kept = torch.tensor([1.0] * 9 + [0.0] * 2)
    written = logits.softmax(1)
    found = torch.stack(target_figures(written, kept))
    np.testing.assert_allclose(found, expected_figures(written[:9].double().numpy()), rtol=1e-5)
    factored = sinkhorn_assignments(logits, 0.5, row_weight=kept)
    p = factored.probs()[:9].double().numpy()
    np.testing.assert_allclose(torch.stack(target_figures(factored, kept)), expected_figures(p), rtol=1e-5)


def test_figures_of_targets_at_their_ends():
    uniform, one = torch.full((6, 8), 1 / 8), torch.eye(8)[[3] * 6]
    assert torch.stack(target_figures(uniform)).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert torch.stack(target_figures(one)).tolist() == pytest.approx([0, 1 / 8], abs=1e-6)
    assert torch.stack(target_figures(torch.eye(8))).tolist() == pytest.approx([0, 1], abs=1e-6)
    assert all(value.isnan() for value in target_figures(uniform, torch.zeros(6)))


@pytest.mark.parametrize(("rows", "width"), [(24, 10), (10, 24)])
def test_figures_of_tokens(rows: int, width: int):
    tokens = RNG.standard_normal((rows, width)) * np.geomspace(1, 1e-3, width) + 0.3
    found = health_of_tokens(torch.from_numpy(tokens))
    z = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert found["health/class_token_std"].item() == pytest.approx(z.std(0).mean() * width**0.5, rel=1e-5)
    assert found["health/rankme"].item() == pytest.approx(rankme(tokens), rel=1e-5)


def test_figures_of_tokens_at_their_ends():
    equal = health_of_tokens(torch.ones(16, 8) * torch.arange(1, 9))
    assert equal["health/class_token_std"] < 1e-6 and equal["health/rankme"].item() == pytest.approx(1, abs=1e-3)
    spread = health_of_tokens(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)))
    assert spread["health/class_token_std"].item() == pytest.approx(1, abs=0.02)
    bad = health_of_tokens(torch.full((4, 8), torch.nan))
    assert all(value.isnan() for value in bad.values())


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_a_step_is_bit_equal_with_and_without_them(centering: str):
    config = tiny_config(f"train.centering={centering}")
    seen = []
    for measured in (False, True):
        trainer, losses = make_trainer(config), []
        step, arch = trainer.training_step, trainer.training_step.arch
        for number, batch in enumerate(random_batches(config, 0, 2)):
            arch.measures_health = measured
            losses.append(step(number, [batch], trainer.schedules[number + 3]))
        assert bool(arch.health) == measured
        seen.append(
            whole_state(trainer) | {f"{i}/{name}": value for i, x in enumerate(losses) for name, value in x.items()}
        )
    assert not differing(*seen)


def test_terms_of_weight_zero_have_no_figures():
    trainer = make_trainer(config := tiny_config("ibot.loss_weight=0"))
    trainer.training_step.arch.measures_health = True
    trainer.training_step(0, random_batches(config, 0, 1), trainer.schedules[0])
    assert trainer.training_step.arch.health.keys() == {"health/dino_entropy", "health/dino_prototype_use"}
