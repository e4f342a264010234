"""Whether two steps compute the same: without that, their times must not be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

THRESHOLDS = {
    "fp32": {"max_loss_error": 1e-4, "min_cosine": 0.9999, "max_norm_error": 1e-3},
    "bf16": {"max_loss_error": 2e-2, "min_cosine": 0.99, "max_norm_error": 5e-2},
}
"""Arguments of `correctness` for a step with float32 or bf16 matmuls, against a float32 reference."""


@dataclass(frozen=True)
class GateResult:
    """How far one step's losses and gradients lie from another's.

    Attributes:
        loss_errors: |ours - reference| / |reference| of each loss.
        cosines: between the gradients of each module, all its parameters as one vector.
        norm_errors: | |ours| / |reference| - 1 | of the same vectors, which a cosine does not see.
        worst_parameter, worst_parameter_cosine: the least alike gradient of any one parameter; not judged, since
            parameters without influence (the keys' biases) have gradients of rounding alone.
        max_loss_error, min_cosine, max_norm_error: what was allowed.
    """

    loss_errors: dict[str, float]
    cosines: dict[str, float]
    norm_errors: dict[str, float]
    worst_parameter: str
    worst_parameter_cosine: float
    max_loss_error: float
    min_cosine: float
    max_norm_error: float

    @property
    def failures(self) -> list[str]:
        """What lies outside the thresholds, NaN included, a phrase each."""
        return [
            *_beyond("relative difference of", self.loss_errors, self.max_loss_error),
            *_beyond("relative difference of the gradient's norm of", self.norm_errors, self.max_norm_error),
            *(
                f"cosine of the gradients of {name} is {value:.6g}, below {self.min_cosine:g}"
                for name, value in self.cosines.items()
                if not value >= self.min_cosine
            ),
        ]

    @property
    def passed(self) -> bool:
        """Whether everything lies within the thresholds."""
        return not self.failures

    def report(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"passed": self.passed, "failures": self.failures, **vars(self)}


def correctness(
    ours_losses: Mapping[str, Tensor | float],
    ours_grads: Mapping[str, Tensor],
    ref_losses: Mapping[str, Tensor | float],
    ref_grads: Mapping[str, Tensor],
    *,
    max_loss_error: float = THRESHOLDS["fp32"]["max_loss_error"],
    min_cosine: float = THRESHOLDS["fp32"]["min_cosine"],
    max_norm_error: float = THRESHOLDS["fp32"]["max_norm_error"],
) -> GateResult:
    """Compare losses and gradients of two steps on the same weights and batch; waits for the device.

    Args:
        ours_losses, ref_losses: 0-d, by name.
        ours_grads, ref_grads: by state-dict name, whose first part is the module; one parameter at a time is widened
            to float64.

    Raises:
        ValueError: the two sides do not have the same names.
    """
    for what, ours, ref in (("losses", ours_losses, ref_losses), ("gradients", ours_grads, ref_grads)):
        if ours.keys() != ref.keys():
            raise ValueError(
                f"The {what} {sorted(ours.keys() ^ ref.keys())[:5]} are on one side only; the same names are needed."
            )
    loss_errors = {name: _relative_error(_number(ours_losses[name]), _number(ref)) for name, ref in ref_losses.items()}
    products: dict[str, list[float]] = {}
    single: dict[str, float] = {}
    for name, ref in ref_grads.items():
        found = _products(ours_grads[name], ref)
        single[name] = _cosine(*found)
        module = name.partition(".")[0]
        total = products.get(module, [0.0, 0.0, 0.0])
        products[module] = [a + b for a, b in zip(total, found, strict=True)]
    worst = min(single, key=lambda name: -math.inf if math.isnan(single[name]) else single[name])
    return GateResult(
        loss_errors=loss_errors,
        cosines={module: _cosine(*sums) for module, sums in products.items()},
        norm_errors={
            module: _relative_error(math.sqrt(ours), math.sqrt(ref)) for module, (_, ours, ref) in products.items()
        },
        worst_parameter=worst,
        worst_parameter_cosine=single[worst],
        max_loss_error=max_loss_error,
        min_cosine=min_cosine,
        max_norm_error=max_norm_error,
    )


def _number(loss: Tensor | float) -> float:
    return loss.item() if isinstance(loss, Tensor) else loss


def _products(ours: Tensor, ref: Tensor) -> list[float]:
    """ours . ref, |ours|^2 and |ref|^2, fetched at once."""
    a, b = (t.detach().flatten().double() for t in (ours, ref.to(ours.device)))
    return torch.stack([a @ b, a @ a, b @ b]).tolist()


def _cosine(product: float, ours: float, ref: float) -> float:
    if ours == ref == 0:
        return 1.0
    return product / math.sqrt(ours * ref) if ours and ref else 0.0


def _relative_error(ours: float, ref: float) -> float:
    if ours == ref:
        return 0.0
    return abs(ours - ref) / abs(ref) if ref else math.inf


def _beyond(what: str, errors: Mapping[str, float], limit: float) -> list[str]:
    return [f"{what} {name} is {error:.3g}, above {limit:g}" for name, error in errors.items() if not error <= limit]
