"""Settings shared by all tests: one thread and fixed seeds, so that results do not depend on the machine."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.helpers.hub_server import HubServer

torch.set_num_threads(1)


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
