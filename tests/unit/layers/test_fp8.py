"""FP8 products against the formats' definition and float64 products of what was quantised."""

import numpy as np
import pytest
import torch

from dinov2.layers.fp8 import fp8_input_gradient, fp8_matmul, fp8_problem, quantise
from dinov2.layers.linear import Linear, keep_low_precision_weights, use_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16_ROUNDING = 2**-8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LACKING = fp8_problem("cpu", per_row=True)
NEEDS_ROWS = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
PER_ROW = pytest.mark.parametrize(
    "per_row", [pytest.param(False, id="tensor"), pytest.param(True, id="row", marks=NEEDS_ROWS)]
)


def representable(dtype: torch.dtype) -> np.ndarray:
    """All finite magnitudes of a format (arXiv:2209.05433, table 1), in the order of their codes."""
    mantissa_bits, bias, largest = (3, 7, 448.0) if dtype == E4M3 else (2, 15, 57344.0)
    steps = 2**mantissa_bits
    codes = np.arange(128)
    exponent, mantissa = codes // steps, codes % steps
    normal = 2.0 ** (exponent - bias) * (1 + mantissa / steps)
    values = np.where(exponent == 0, 2.0 ** (1 - bias) * mantissa / steps, normal)
    return values[values <= largest]


def dequantised(matrix: torch.Tensor, per_row: bool, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """float64: each number over its scale, at the nearest representable one (ties to even), times the scale."""
    values = matrix.detach().cpu().float().numpy()
    table = representable(dtype)
    amax = np.abs(values).max(axis=1 if per_row else None, keepdims=True)
    scale = np.maximum(amax / np.float32(table[-1]), np.finfo(np.float32).tiny)
    scaled = np.abs(values / scale).astype(np.float64)
    above = np.searchsorted(table, scaled).clip(1, len(table) - 1)
    below = above - 1
    to_above, to_below = table[above] - scaled, scaled - table[below]
    upper = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    nearest = np.where(upper, table[above], table[below])
    return torch.from_numpy(np.sign(values) * nearest * scale.astype(np.float64))


def uneven(rows: int, columns: int, decades: float) -> torch.Tensor:
    """Normal numbers whose rows differ in size by that many powers of ten."""
    return torch.randn(rows, columns) * torch.logspace(0, -decades, rows)[:, None]


def relative_error(found: torch.Tensor, expected: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    expected = expected.to(found.device)
    return (found.double() - expected).norm(dim=dim) / expected.norm(dim=dim)


@PER_ROW
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_go_to_the_nearest_of_the_format(per_row, dtype):
    for matrix in (uneven(20, 64, 6), uneven(20, 64, 6).bfloat16(), torch.randn(64, 20).t()):
        quantised, scale = quantise(matrix, per_row, dtype)
        assert quantised.dtype == dtype and scale.dtype == torch.float32
        assert quantised.is_contiguous() and scale.shape == ((len(matrix), 1) if per_row else ())
        assert torch.equal(quantised.double() * scale.double(), dequantised(matrix, per_row, dtype))


@PER_ROW
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_quantised_factors(per_row, device, weight_dtype):
    x, weight = uneven(21, 64, 2).bfloat16(), torch.randn(48, 64).to(weight_dtype)
    bias = torch.randn(48).bfloat16()
    expected = dequantised(x, per_row) @ dequantised(weight, per_row).T + bias.double()
    found = fp8_matmul(x.to(device), weight.to(device), per_row, bias.to(device))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu().double(), expected, rtol=BF16_ROUNDING, atol=1e-3)


@PER_ROW
def test_error_against_the_exact_product_is_within_what_three_mantissa_bits_allow(per_row):
    x, weight = torch.randn(100, 256).bfloat16(), torch.randn(64, 256)
    exact = x.double() @ weight.double().T
    found = fp8_matmul(x, weight, per_row)
    # Rounding to nearest is off by at most 1/16 of a number, by 1/38 at the root of the mean square.
    magnitudes = x.double().abs() @ weight.double().abs().T
    assert ((found.double() - exact).abs() <= ((1 + 1 / 16) ** 2 - 1 + BF16_ROUNDING) * magnitudes).all()
    assert relative_error(found, exact) < 0.05


@NEEDS_ROWS
def test_scales_per_row_serve_rows_of_very_different_size():
    x, weight = uneven(16, 64, 8), torch.randn(32, 64)
    exact = x.double() @ weight.double().T
    by_row, by_tensor = (relative_error(fp8_matmul(x, weight, row), exact, dim=1) for row in (True, False))
    assert by_row.max() < 0.06
    assert by_tensor.max() == 1


@PER_ROW
@pytest.mark.parametrize("device", DEVICES)
def test_the_input_gradient_is_that_of_the_quantised_factors(per_row, device):
    grad, weight = uneven(21, 48, 5).bfloat16(), uneven(48, 64, 1)
    columns = dequantised(weight.T, per_row).T
    expected = dequantised(grad, per_row, E4M3 if per_row else E5M2) @ columns
    found = fp8_input_gradient(grad.to(device), weight.to(device), per_row)
    assert found.dtype == torch.bfloat16 and found.shape == (21, 64)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=BF16_ROUNDING, atol=1e-4)
    exact = grad.double() @ weight.double()
    assert (relative_error(found.cpu(), exact, dim=1) < (0.06 if per_row else 0.2)).all()


@PER_ROW
@pytest.mark.parametrize("size", [0.0, 1e-42])
def test_zeros_and_vanishing_numbers_stay_finite(per_row, size):
    x, weight, bias = torch.full((5, 32), size), torch.randn(16, 32), torch.randn(16).bfloat16()
    assert torch.equal(fp8_matmul(x, weight, per_row, bias), bias.expand(5, 16))
    assert torch.equal(fp8_input_gradient(x, weight.T.contiguous(), per_row), torch.zeros(5, 16).bfloat16())
    assert not fp8_matmul(torch.randn(5, 32), torch.full((16, 32), size), per_row).any()


@PER_ROW
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_result(per_row, device, bad):
    x, weight = torch.randn(5, 32, device=device), torch.randn(16, 32, device=device)
    bad_x, bad_weight = x.clone(), weight.clone()
    bad_x[2, 7] = bad_weight[3, 7] = bad
    by_row, by_column = fp8_matmul(bad_x, weight, per_row), fp8_matmul(x, bad_weight, per_row)
    assert not by_row[2].isfinite().any() and not by_column[:, 3].isfinite().any()
    assert not fp8_input_gradient(bad_x, weight.t().contiguous(), per_row)[2].isfinite().any()
    if per_row:
        assert by_row[[0, 1, 3, 4]].isfinite().all() and by_column[:, :3].isfinite().all()


@PER_ROW
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("fp8_backward", [False, True])
def test_a_layers_gradients(per_row, device, copies, fp8_backward):
    layer = Linear(64, 48).to(device)
    if copies:
        keep_low_precision_weights(layer, torch.bfloat16)
    use_fp8(layer, "row" if per_row else "tensor", backward=fp8_backward)
    x = torch.randn(3, 7, 64, device=device, requires_grad=True)
    direction = torch.randn(3, 7, 48, device=device)
    out = layer(x)
    (out * direction).sum().backward()

    rows, grad = x.detach().bfloat16().flatten(0, 1), direction.bfloat16().flatten(0, 1)
    weight = layer.weight.detach().bfloat16() if copies else layer.weight.detach()
    assert torch.equal(out.flatten(0, 1), fp8_matmul(rows, weight, per_row, layer.bias.detach().bfloat16()))
    expected = (
        fp8_input_gradient(grad, weight, per_row).double()
        if fp8_backward
        else grad.double() @ weight.bfloat16().double()
    )
    found = (x.grad.flatten(0, 1), layer.weight.grad, layer.bias.grad)
    formulas = (expected, grad.double().T @ rows.double(), grad.double().sum(0))
    for one, formula in zip(found, formulas, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), formula, rtol=BF16_ROUNDING, atol=1e-4)


def test_the_cpu_can():
    assert fp8_problem("cpu") is None


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_gpus_can_from_ada_on(monkeypatch, capability, can):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.version, "hip", None)
    problem = fp8_problem(torch.device("cuda", 0))
    assert problem is None if can else problem.startswith("NVIDIA X has CUDA capability 8.0; FP8 needs 8.9")


def test_other_devices_and_old_torch_cannot(monkeypatch):
    assert "not implemented for mps" in fp8_problem("mps")
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "has no FP8 matmuls" in fp8_problem("cpu")
