"""Two-layer feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc2(act(fc1(x))), keys ``fc1`` and ``fc2``.

    Args:
        in_features: D, also the output width.
        hidden_features: width between the two maps.
        act_layer: activation.
        bias: of both maps.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D)."""
        return self.fc2(self.act(self.fc1(x)))
