"""FP8 products in float32: PyTorch's kernel for CPUs, which the unit tests are of, can take a minute a step."""

from __future__ import annotations

from torch import Tensor, dtype


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: dtype, bias: Tensor | None = None,
    use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """In place of ``torch._scaled_mm``."""
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)
