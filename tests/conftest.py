"""Settings shared by all tests: one thread and fixed seeds, so that results do not depend on the machine."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dinov2.train.plan.measure import StepCosts, StepFlops
from tests.helpers.hub_server import HubServer

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def steps_measured_once() -> Iterator[None]:
    """Hundreds of runs start with one of a few networks, and measuring a step takes seconds each time."""
    measured: dict[str, StepFlops] = {}
    measure = StepCosts.flops
    sections = ("student", "crops", "dino", "ibot", "losses", "performance", "debug", "compute_precision", "train")

    def flops(costs: StepCosts, images: int) -> StepFlops:
        key = repr((images, costs.compiled, *(getattr(costs.config, section) for section in sections)))
        return measured.get(key) or measured.setdefault(key, measure(costs, images))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepCosts, "flops", flops)
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub, named by the environment, with nobody logged in."""
    with HubServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
        yield server
