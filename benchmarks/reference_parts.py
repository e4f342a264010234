"""What the two reference steps share: networks, KDE, and the update, in plain eager PyTorch.

Written from the papers' equations and from the published trainers' behaviour, and importing none of this library, so
that a mistake cannot be common to both sides of a comparison. The recipe (docs/recipe.md) is fixed here: student
temperature 0.1, three Sinkhorn iterations, loss weights 1 but for KDE's, AdamW with betas 0.9 and 0.999 at one
learning rate but for the patch embedding's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tensor dimensions below: B images, N tokens, R registers, T rows of all images, D width, Z bottleneck,
# K prototypes, M rows of the padded mask index.

Sizes = Sequence[tuple[int, int]]
"""(images, tokens per image) of each crop size among packed rows."""

STUDENT_TEMP = 0.1
SINKHORN_ITERATIONS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepSpec:
    """The shape of one training step.

    Attributes:
        ffn: "swiglufused" or "mlp".
        ffn_dim: width between the maps of the feed-forward part; of each half of SwiGLU's.
        drop_path: rate of stochastic depth in [0, 1).
        global_size, local_size: sides of the crops in pixels; two global views.
        prototypes, ibot_prototypes: K of the heads; the latter for a separate iBOT head only.
        kde_weight: factor of the KDE term, 0 leaves it out.
        clip: largest gradient norm of a module, 0 for none.
        dtype: of the matmuls: "bf16", "fp16" or "fp32" (then everything is in the states' own dtype).
        patch_lr_factor: learning rate of the patch embedding relative to the rest.
    """

    embed_dim: int = 1536
    depth: int = 40
    heads: int = 24
    ffn: str = "swiglufused"
    ffn_dim: int = 4096
    patch: int = 14
    registers: int = 4
    drop_path: float = 0.4
    global_size: int = 224
    local_size: int = 98
    local_crops: int = 8
    prototypes: int = 131072
    ibot_prototypes: int = 131072
    head_hidden_dim: int = 2048
    head_layers: int = 3
    dino_bottleneck: int = 384
    ibot_bottleneck: int = 256
    separate_ibot_head: bool = True
    kde_weight: float = 0.05
    kde_kappa: float = 5.0
    clip: float = 3.0
    patch_lr_factor: float = 0.2
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.ffn not in FEED_FORWARD:
            raise ValueError(
                f"dtype is {self.dtype!r} and ffn {self.ffn!r}; one of {', '.join(DTYPES)} and one of "
                f"{', '.join(FEED_FORWARD)} are expected."
            )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input: autocast would turn a 16-bit stream into float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerScale(nn.Module):
    """A gain per channel, one multiplication of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, update: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale (T, D), in ``dtype`` or the update's, whichever is wider."""
        return update * self.gamma.to(dtype)


class Attention(nn.Module):
    """Attention within each image: joint projections, then one dense call per crop size."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """Map packed rows (T, D)."""
        attended = [self._attend(part) for part in unpack(self.qkv(rows), sizes)]
        return self.proj(pack(attended))

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, self.heads, -1)).unbind(2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Map (T, D)."""
        return self.fc2(F.gelu(self.fc1(rows)))


class SwiGlu(nn.Module):
    """Two maps in one product, one gating the other, and a map back."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Map (T, D)."""
        gate, value = self.w12(rows).tensor_split(2, dim=-1)
        return self.w3(value * F.silu(gate))


FEED_FORWARD: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglufused": SwiGlu}


class Block(nn.Module):
    """The two residual branches of a block; who adds them, and for which images, is up to the step."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        dim = spec.embed_dim
        self.norm1, self.norm2 = LayerNorm(dim, eps=1e-6), LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, spec.heads)
        self.mlp = FEED_FORWARD[spec.ffn](dim, spec.ffn_dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def attention(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """First branch, packed rows (T, D)."""
        return self.ls1(self.attn(self.norm1(rows), sizes), rows.dtype)

    def feed_forward(self, rows: Tensor, sizes: Sizes) -> Tensor:
        """Second branch, packed rows (T, D)."""
        return self.ls2(self.mlp(self.norm2(rows)), rows.dtype)


class Backbone(nn.Module):
    """The parts of a vision transformer with registers, under DINOv2's parameter names."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__()
        dim = spec.embed_dim
        self.patch, self.registers = spec.patch, spec.registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, spec.patch, spec.patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (spec.global_size // spec.patch) ** 2, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, spec.registers, dim))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = LayerNorm(dim, eps=1e-6)

    def tokens(self, crops: Tensor, masks: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """Class token, registers and patches (B, 1 + R + N, D) of crops (B, 3, S, S).

        Args:
            masks: bool (B, N), where the mask token stands for the patch.
            dtype: of the residual stream; None for float32, or float64 if the weights are.
        """
        patches = self.patch_embed["proj"](crops).flatten(2).transpose(1, 2)
        dtype = dtype or torch.promote_types(patches.dtype, torch.float32)
        patches = patches.to(dtype)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(dtype), patches)
        positions = self._positions(crops.shape[-2] // self.patch, crops.shape[-1] // self.patch).to(dtype)
        first = (self.cls_token.to(dtype) + positions[:, :1]).expand(len(crops), -1, -1)
        if self.registers:
            registers = self.register_tokens.to(dtype).expand(len(crops), -1, -1)
            first = torch.cat([first, registers], dim=1)
        return torch.cat([first, patches + positions[:, 1:]], dim=1)

    def _positions(self, rows: int, columns: int) -> Tensor:
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        patches = grid.to(self.pos_embed.dtype).flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)


class LastLayer(nn.Module):
    """Weight-normed map to prototypes, formed anew at each call by PyTorch's eager kernel."""

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, rows: Tensor) -> Tensor:
        """Map (M, Z) to (M, K)."""
        return F.linear(rows, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """MLP to a bottleneck, L2 normalisation, `LastLayer`."""

    def __init__(self, spec: StepSpec, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        hidden = [spec.head_hidden_dim] * (spec.head_layers - 1)
        layers: list[nn.Module] = []
        for inner, outer in zip([spec.embed_dim, *hidden], [*hidden, bottleneck], strict=True):
            layers += [nn.Linear(inner, outer), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1]) if hidden else layers[0]
        self.last_layer = LastLayer(bottleneck, prototypes)

    def forward(self, rows: Tensor) -> Tensor:
        """Map (M, D) to (M, K)."""
        bottleneck = self.mlp(rows)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))


def pack(parts: Sequence[Tensor]) -> Tensor:
    """(B, N, D) of each size to packed rows (T, D)."""
    rows = [part.flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpack(rows: Tensor, sizes: Sizes) -> list[Tensor]:
    """Packed rows (T, D) to (B, N, D) of each size."""
    parts = rows.split([images * tokens for images, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def kde(class_tokens: Tensor, kappa: float) -> Tensor:
    """mean_i log( 1/(B-1) sum_{j != i} exp(kappa z_i . z_j) ) with z the rows of (B, D) at length 1."""
    z = F.normalize(at_least_float32(class_tokens), dim=-1)
    similarity = kappa * z @ z.mT
    similarity.fill_diagonal_(-math.inf)
    return similarity.logsumexp(1).mean() - math.log(len(z) - 1)


class EagerStep(ABC):
    """Student, teacher, optimiser and the update that both reference steps make.

    Args:
        spec: shape of the step.
        student_state, teacher_state: state dicts with keys ``backbone.*``, ``dino_head.*``, ``ibot_head.*``; copied.
        device: where to compute.
        rates: of stochastic depth, per block.
    """

    def __init__(
        self,
        spec: StepSpec,
        student_state: Mapping[str, Tensor],
        teacher_state: Mapping[str, Tensor],
        device: torch.device | str,
        rates: Sequence[float],
    ) -> None:
        self.spec, self.device, self.rates = spec, torch.device(device), rates
        self.dtype = DTYPES[spec.dtype]
        self.student = self._network(student_state)
        self.teacher = self._network(teacher_state).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.999), foreach=True)

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor], teacher_temp: float) -> dict[str, Tensor]:
        """0-d losses of a normalised, view-major batch: ``total_loss`` and its unweighted terms."""

    def named_gradients(self) -> dict[str, Tensor]:
        """The student's gradients by state-dict name, after ``losses(...)["total_loss"].backward()``."""
        return {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}

    def autocast(self) -> torch.autocast:
        """16-bit matmuls, unless the step is in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _network(self, state: Mapping[str, Tensor]) -> nn.ModuleDict:
        spec = self.spec
        with torch.device("meta"):
            modules = {
                "backbone": Backbone(spec),
                "dino_head": Head(spec, spec.dino_bottleneck, spec.prototypes),
            }
            if spec.separate_ibot_head:
                modules["ibot_head"] = Head(spec, spec.ibot_bottleneck, spec.ibot_prototypes)
            network = nn.ModuleDict(modules)
        copies = {name: tensor.detach().to(self.device, copy=True) for name, tensor in state.items()}
        network.load_state_dict(copies, assign=True)
        return network

    def _groups(self) -> list[dict]:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.student.named_parameters():
            lr_factor = self.spec.patch_lr_factor if "patch_embed" in name else 1.0
            undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
            groups.setdefault((lr_factor, 0.0 if undecayed else 1.0), []).append(parameter)
        return [{"params": params, "lr_factor": lr, "decay_factor": wd} for (lr, wd), params in groups.items()]

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch's tensors on the device, copied on the stream that computes."""
        spec, names = self.spec, ("global_crops", "local_crops", "masks", "mask_indices", "mask_weight")
        moved = {name: batch[name].to(self.device, non_blocking=True) for name in names}
        images = len(moved["masks"]) // 2
        for name, number, size in (
            ("global_crops", 2 * images, spec.global_size),
            ("local_crops", spec.local_crops * images, spec.local_size),
        ):
            if moved[name].shape != (number, 3, size, size):
                raise ValueError(f"{name} is {tuple(moved[name].shape)}; {(number, 3, size, size)} is expected.")
        return moved

    def _total(self, losses: dict[str, Tensor], class_tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Add KDE of the global views' class tokens, (B, D) each, and the total."""
        total = sum(losses.values())
        if self.spec.kde_weight:
            losses["kde_loss"] = sum(kde(view, self.spec.kde_kappa) for view in class_tokens)
            total = total + self.spec.kde_weight * losses["kde_loss"]
        return {"total_loss": total, **losses}

    def _clip(self) -> None:
        if self.spec.clip:
            for module in self.student.values():
                nn.utils.clip_grad_norm_(module.parameters(), self.spec.clip)

    def _update(self, lr: float, wd: float, momentum: float, optimize: Callable[[], object]) -> None:
        """AdamW at the given rates through ``optimize``, then the EMA in two passes."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
            group["weight_decay"] = wd * group["decay_factor"]
        optimize()
        with torch.no_grad():
            teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
            torch._foreach_mul_(teacher, momentum)
            torch._foreach_add_(teacher, student, alpha=1 - momentum)
