"""Real tissue for the augmentation tests."""

import numpy as np
import pytest
from skimage import data


@pytest.fixture(scope="session")
def tissue() -> np.ndarray:
    """A stained section, uint8 (512, 512, 3)."""
    return data.immunohistochemistry()


@pytest.fixture(scope="session")
def tiles(tissue: np.ndarray) -> list[np.ndarray]:
    """Nine tiles of it, uint8 (170, 170, 3)."""
    return [np.ascontiguousarray(tissue[y : y + 170, x : x + 170]) for y in (0, 170, 340) for x in (0, 170, 340)]
