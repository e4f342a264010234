"""Settings shared by all tests: one thread and fixed seeds, so that results do not depend on the machine."""

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dinov2.train import run
from dinov2.train.plan.measure import StepCosts, StepFlops
from tests.helpers.hub_server import HubServer

pytest_plugins = ["tests.helpers.slides"]

torch.set_num_threads(1)
# A shell's background jobs ignore it, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def runs_measure_once() -> Iterator[None]:
    """Hundreds of runs start with one of a few networks, and measuring a step takes seconds each time."""
    measured: dict[str, StepFlops] = {}
    sections = ("student", "crops", "dino", "ibot", "losses", "performance", "debug", "compute_precision", "train")

    class Remembered(StepCosts):
        def flops(self, images: int) -> StepFlops:
            key = repr((images, self.compiled, *(getattr(self.config, section) for section in sections)))
            return measured.get(key) or measured.setdefault(key, super().flops(images))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "StepCosts", Remembered)
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
