"""Linear heads: what they learn, which of their states is kept, and where their random numbers come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from dinov2.eval.probe.linear import EVA, KAIKO, train_heads

PROTOCOLS = pytest.mark.parametrize("protocol", [EVA, KAIKO], ids=["eva", "kaiko"])


def clouds(count, spread, seed, width=16, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = 2 * np.random.default_rng(9).normal(size=(classes, width))
    rows = centres[labels] + spread * rng.normal(size=(count, width))
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)


@PROTOCOLS
def test_separable_classes(protocol):
    head = train_heads(clouds(300, 0.1, 0), clouds(100, 0.1, 1), 3, replace(protocol, steps=2500), runs=2)
    features, labels = clouds(200, 0.1, 2)
    # Not quite 1: the first state that is right on all of validation is kept, and its margin is small.
    assert (head.scores(features).argmax(-1) == labels).float().mean() > 0.97
    assert head.accuracy.tolist() == [1, 1]


@PROTOCOLS
def test_as_good_as_logistic_regression(protocol):
    train, val, (features, labels) = clouds(1000, 4, 0), clouds(1000, 4, 1), clouds(4000, 4, 2)
    reference = LogisticRegression(max_iter=1000).fit(*train).score(features, labels)
    head = train_heads(train, val, 3, replace(protocol, steps=2500), runs=2)
    accuracy = (head.scores(features).argmax(-1) == labels).float().mean(1)
    assert 0.6 < reference < 0.95
    assert (accuracy - reference).abs().max() < 0.02


@PROTOCOLS
def test_steps_are_those_of_torch(protocol):
    """One epoch in a single batch per step, against nn.Linear and the optimiser itself."""
    (rows, labels), steps, seed = clouds(50, 3, 0), 4, 7
    head = train_heads((rows, labels), (rows, labels), 3, replace(protocol, steps=steps), runs=2, seed=seed - 1)
    linear, bound = torch.nn.Linear(16, 3), 0.25
    generator = torch.Generator().manual_seed(seed)  # that of run 1
    with torch.no_grad():
        linear.weight.copy_(torch.empty(16, 3).uniform_(-bound, bound, generator=generator).T)
        linear.bias.copy_(torch.empty(1, 3).uniform_(-bound, bound, generator=generator)[0])
    if protocol is EVA:
        optimizer = torch.optim.AdamW(linear.parameters(), 3e-4)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    else:
        optimizer = torch.optim.SGD(linear.parameters(), 0.000625, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(linear(rows), labels).backward()
        optimizer.step()
        schedule.step()
        states.append([p.detach().clone() for p in (linear.weight, linear.bias)])
    weight, bias = states[int(head.step[1]) - 1]
    torch.testing.assert_close(head.weight[1], weight.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.bias[1, 0], bias, rtol=1e-5, atol=1e-6)


def test_first_of_the_best_validations_is_kept():
    """Validation labels are wrong: the head is best before it has learned."""
    rows, labels = clouds(200, 0.1, 0, classes=2)
    head = train_heads((rows, labels), (rows, 1 - labels), 2, replace(EVA, steps=300), runs=4)
    long = train_heads((rows, labels), (rows, labels), 2, replace(EVA, steps=300), runs=4)
    assert (long.scores(rows).argmax(-1) == labels).all()
    best = (head.scores(rows).argmax(-1) == 1 - labels).float()
    balanced = torch.stack([best[:, labels == c].mean(1) for c in (0, 1)]).mean(0)
    torch.testing.assert_close(balanced, head.accuracy)
    assert (head.step < 100).all()


def test_random_state_is_untouched_and_runs_differ():
    state = torch.get_rng_state()
    train = clouds(100, 3, 0)
    head, again = (train_heads(train, train, 3, replace(EVA, steps=10), runs=2, seed=3) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(head.weight, again.weight) and not torch.equal(head.weight[0], head.weight[1])
    other = train_heads(train, train, 3, replace(EVA, steps=10), runs=1, seed=4)
    torch.testing.assert_close(other.weight[0], head.weight[1])
