"""The projection head of DINO and iBOT."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.linear import draw_weights
from dinov2.layers.norm import at_least_float32

# Tensor dimensions below: D width, Z bottleneck, K prototypes.


class DINOHead(nn.Module):
    """Tokens to prototype logits: an MLP to a bottleneck, L2 normalisation, a weight-normed linear map.

    DINO (arXiv:2104.14294, appendix C): logit_k = g_k <v_k / ||v_k||, z / ||z||> with z = MLP(x).

    Args:
        in_dim, bottleneck_dim, out_dim: D, Z and K.
        use_bn: batch norm after every hidden layer.
        nlayers, hidden_dim: linear layers of the MLP, at least 1, and width between them.
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
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths[:-1]):
            norm = [nn.BatchNorm1d(outer)] if use_bn else []
            layers += [nn.Linear(inner, outer, bias=mlp_bias), *norm, nn.GELU()]
        last = nn.Linear(widths[-2], bottleneck_dim, bias=mlp_bias)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw starting weights: `draw_weights` in the MLP, and as `WeightNormLinear` says."""
        draw_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., D) of any dtype to logits (..., K)."""
        rows = x.flatten(0, -2).to(self.last_layer.weight_v.dtype)
        z = self.mlp(rows)
        eps = 1e-6 if z.dtype == torch.float16 else 1e-12
        logits = self.last_layer(F.normalize(at_least_float32(z), dim=-1, eps=eps))
        return logits.unflatten(0, x.shape[:-1])


class WeightNormLinear(nn.Module):
    """y = W x with K rows W_k = g_k v_k / ||v_k|| (arXiv:1602.07868, eq. 2); the gains start at 1 and are trained."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Unit gains, and directions as PyTorch starts a linear layer: uniform within 1 / sqrt(Z)."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., Z) to (..., K); rows are normalised in float32 or better, multiplied in the parameters' dtype
        or that of autocast.

        Without gradients bfloat16 gives way to float16: unit vectors fit it, and at a temperature of 0.04 the three
        bits more make the teacher's targets eight times as exact. Gradients of the logits would underflow.
        """
        weight = at_least_float32(self.weight_g) * F.normalize(at_least_float32(self.weight_v), dim=1)
        kind, dtype = x.device.type, self.weight_v.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if dtype == torch.bfloat16 and not torch.is_grad_enabled():
            dtype = torch.float16
        with torch.autocast(kind, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype))
