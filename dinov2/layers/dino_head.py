"""Projection head of DINO and iBOT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """Tokens to prototype logits: an MLP to a bottleneck, L2 normalisation, a weight-normed linear map.

    DINO (arXiv:2104.14294, section 3.2 and appendix C), with z the normalised bottleneck and v_k, g_k the
    direction and gain of prototype k: logit_k = g_k (v_k / ||v_k||) . z

    Args:
        in_dim: width of the tokens.
        out_dim: K, number of prototypes.
        use_bn: batch normalisation in the MLP.
        nlayers: linear layers of the MLP, at least 1.
        hidden_dim: width of the MLP.
        bottleneck_dim: width of the normalised bottleneck.
        mlp_bias: biases in the MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=mlp_bias))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal weights of deviation 0.02 and zero biases in the MLP; unit gains in the last layer."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()
        self.last_layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., K) of tokens (..., in_dim)."""
        z = self.mlp(x)
        eps = 1e-6 if z.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(z.float() if z.dtype != torch.float64 else z, dim=-1, eps=eps).to(z.dtype))


class WeightNormLinear(nn.Module):
    """y = W x with rows W_k = g_k v_k / ||v_k|| (Salimans & Kingma, arXiv:1602.07868); keys ``weight_g``, ``weight_v``.

    The norm is taken in float32 or better. Gains are trained.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gains of one; directions as PyTorch initialises a linear layer."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        v = self.weight_v if self.weight_v.dtype == torch.float64 else self.weight_v.float()
        return F.linear(x, (self.weight_g * F.normalize(v, dim=1)).to(x.dtype))
