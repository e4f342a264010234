"""ODCorr against numpy's correlation coefficients and its limits."""

import numpy as np
import pytest

from dinov2.eval import odcorr


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_formula(shape):
    rows = np.random.default_rng(0).normal(1, 1, shape).astype(np.float32)
    rho = np.corrcoef(rows.astype(np.float64))
    off_diagonal = rho[~np.eye(len(rows), dtype=bool)]
    assert odcorr(rows) == pytest.approx(np.sqrt(np.mean(off_diagonal**2)), rel=1e-6)


def test_limits():
    direction = np.random.default_rng(1).normal(size=32)
    assert odcorr(np.tile(direction, (8, 1))) == pytest.approx(1)
    assert odcorr(np.stack([direction, -3 * direction + 2])) == pytest.approx(1)
    hadamard = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])  # centred and orthogonal
    assert odcorr(hadamard) == pytest.approx(0, abs=1e-7)
    assert np.isnan(odcorr(np.ones((3, 4))))
    with pytest.raises(ValueError, match="1 is given, 2 are needed"):
        odcorr(hadamard[:1])
