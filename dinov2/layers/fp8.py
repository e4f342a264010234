"""Matmuls in FP8 with scales taken from the operands themselves (formats: arXiv:2209.05433)."""

import torch
from torch import Tensor

# Both must divide by this in `torch._scaled_mm`: the summed dimension and the width of the result.
WIDTH_MULTIPLE = 16
COMPUTE_DTYPE = torch.bfloat16

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_MIN_CAPABILITY = (8, 9)


def fp8_problem(device: torch.device | str, per_row: bool = False) -> str | None:
    """Say why FP8 matmuls cannot be used on the operands' device, in one sentence; None where they can.

    ``per_row`` asks for one scale per row instead of one per tensor.
    """
    device = torch.device(device)
    if not hasattr(torch, "_scaled_mm") or not hasattr(torch, "float8_e4m3fn"):
        return f"PyTorch {torch.__version__} has no FP8 matmuls; 2.11 or newer has them."
    if device.type == "cpu":
        ones, scale = torch.ones(16, 16).to(_E4M3), torch.ones(16, 1)
        try:
            if per_row:  # torch 2.11 does not, 2.15 does
                torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=COMPUTE_DTYPE)
        except RuntimeError:
            return f"PyTorch {torch.__version__} has no FP8 matmuls with scales per row on a CPU; use one per tensor."
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"FP8 matmuls are not implemented for {device}; an NVIDIA GPU or the CPU can do them."
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, _MIN_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        return f"{name} has CUDA capability {has}; FP8 needs {needed} or higher (Ada, Hopper or newer)."
    return None


def quantise(matrix: Tensor, per_row: bool, dtype: torch.dtype = _E4M3) -> tuple[Tensor, Tensor]:
    """Scale a matrix so that its largest magnitude becomes the largest of an FP8 format, and round to nearest.

    ``matrix``, floating (M, K) of any strides, is about ``quantised.float() * scale``. A NaN or an infinity makes
    everything under its scale NaN. There is one scale per row or one for all.

    Returns:
        The quantised matrix, contiguous, and its scale, float32 (M, 1) or 0-d.
    """
    values = matrix.float()
    magnitudes = values.abs()
    amax = magnitudes.amax(1, keepdim=True) if per_row else magnitudes.amax()
    # Zeros need some scale; clamping leaves NaN a NaN.
    scale = (amax / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scale).to(dtype).contiguous(), scale


def fp8_matmul(a: Tensor, b: Tensor, per_row: bool, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, both factors in e4m3: (M, K), (N, K), bfloat16 (N,) -> bfloat16 (M, N).

    K and N must divide by `WIDTH_MULTIPLE`. On Hopper the tensor cores' short accumulator is kept.
    """
    return _scaled_mm(quantise(a, per_row), quantise(b, per_row), bias, fast_accum=True)


def fp8_input_gradient(grad: Tensor, weight: Tensor, per_row: bool) -> Tensor:
    """g W: (M, N), (N, K) -> bfloat16 (M, K).

    The gradients of different tokens differ by orders of magnitude: under one scale for all of them e4m3 would flush
    the small ones to zero, so they go in e5m2. With a scale per row e4m3 suffices and rounds half as coarsely.
    """
    rows = quantise(grad, per_row, _E4M3 if per_row else _E5M2)
    return _scaled_mm(rows, quantise(weight.t(), per_row), None, fast_accum=False)


def _scaled_mm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bias: Tensor | None, fast_accum: bool) -> Tensor:
    return torch._scaled_mm(
        a[0], b[0].t(), a[1], b[1].t(), bias=bias, out_dtype=COMPUTE_DTYPE, use_fast_accum=fast_accum
    )
