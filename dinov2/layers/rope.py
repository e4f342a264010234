"""Axial rotary positions of patches (Su et al., arXiv:2104.09864; DINOv3, arXiv:2508.10104, section 3.2)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dinov2.layers.norm import at_least_float32

NORMALISATIONS = ("separate", "min", "max")
_DRAWS = 5  # per grid: two of the shift, two of the jitter, one of the rescaling


class RopePositionEmbedding(nn.Module):
    """Angles of which pairs of a head's channels are turned, by the coordinates of each patch.

    The centre of row i of H lies at y = 2 (i + 1/2) / H - 1, likewise x; channel j < E / 4 of a head of width E turns
    by 2 pi y / T_j, channel j + E / 4 by 2 pi x / T_j, each together with the channel E / 2 further on. Everything is
    computed in float32 or better. ``periods`` T (E / 4,) are a buffer of the state dict, as Meta's files have them.

    Args:
        head_width: E, a multiple of 4.
        base: T_j = base^(4 j / E); or None, with the periods spaced evenly on a logarithmic scale from ``min_period``
            to ``max_period``.
        normalize_coords: one of `NORMALISATIONS`: what coordinates are divided by, the side of the same direction or
            for both the shorter or longer one.
        shift_coords, jitter_coords, rescale_coords: augmentation of the coordinates by `drawn`; None for none.
    """

    periods: Tensor

    def __init__(
        self,
        head_width: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: Literal["separate", "min", "max"] = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
    ):
        super().__init__()
        if head_width % 4:
            raise ValueError(f"Heads are {head_width} wide; rotary positions need a multiple of 4.")
        if (base is None) == (min_period is None) or (min_period is None) != (max_period is None):
            raise ValueError(
                f"base is {base}, min_period {min_period} and max_period {max_period}; the base alone or both periods "
                "alone are expected."
            )
        if normalize_coords not in NORMALISATIONS:
            raise ValueError(
                f"normalize_coords is {normalize_coords!r}; one of {', '.join(NORMALISATIONS)} is expected."
            )
        self.base, self.min_period, self.max_period = base, min_period, max_period
        self.normalize_coords = normalize_coords
        self.shift_coords, self.jitter_coords, self.rescale_coords = shift_coords, jitter_coords, rescale_coords
        self.register_buffer("periods", torch.empty(head_width // 4, dtype=torch.float32))
        self.reset_parameters()

    @property
    def is_augmented(self) -> bool:
        """Whether coordinates are changed at random in training."""
        return any(o is not None for o in (self.shift_coords, self.jitter_coords, self.rescale_coords))

    def reset_parameters(self) -> None:
        """Compute the periods."""
        steps = torch.arange(len(self.periods), dtype=torch.float32, device=self.periods.device)
        if self.base is not None:
            periods = self.base ** (steps / len(self.periods))
        else:
            ratio = self.max_period / self.min_period
            periods = self.min_period * ratio ** (steps / max(len(self.periods) - 1, 1))
        self.periods.copy_(periods)

    def drawn(self, number: int) -> Tensor:
        """Random numbers (number, 5) for as many augmentations, with torch's generator of the device."""
        return torch.rand(number, _DRAWS, device=self.periods.device)

    def forward(self, size: tuple[int, int], draws: Tensor | None = None) -> Tensor:
        """Cosines and sines of a grid, for `rotate`.

        Args:
            size: H rows and W columns of patches.
            draws: (S, 5) in [0, 1), see `drawn`: coordinates are shifted by U(-shift, shift) and multiplied by
                exp U(-ln jitter, ln jitter), each direction by its own, and both by exp U(-ln rescale, ln rescale).
                None leaves them.

        Returns:
            (S, 2, H * W, E / 2), S = 1 without draws, patches row by row.
        """
        periods = at_least_float32(self.periods)
        over = {"separate": size, "min": (min(size),) * 2, "max": (max(size),) * 2}[self.normalize_coords]
        centres = [
            (torch.arange(side, dtype=periods.dtype, device=periods.device) + 0.5) * (2 / whole) - 1
            for side, whole in zip(size, over, strict=True)
        ]
        coordinates = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)[None]  # (1, N, 2)
        if draws is not None:
            coordinates = self._augmented(coordinates, (2 * draws - 1)[:, None])
        angles = (2 * math.pi * coordinates[..., None] / periods).flatten(2)  # (S, N, E / 2)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def _augmented(self, coordinates: Tensor, signed: Tensor) -> Tensor:
        """With draws (S, 1, 5) in [-1, 1)."""
        if self.shift_coords is not None:
            coordinates = coordinates + self.shift_coords * signed[..., :2]
        if self.jitter_coords is not None:
            coordinates = coordinates * (math.log(self.jitter_coords) * signed[..., 2:4]).exp()
        if self.rescale_coords is not None:
            coordinates = coordinates * (math.log(self.rescale_coords) * signed[..., 4:]).exp()
        return coordinates


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of channels of the last tokens, those of patches; tokens before them stay.

    Args:
        x: queries or keys (B, P + N, heads, E), of any dtype, which is kept.
        rotation: (2, N, E / 2), cosines and sines of the N patches; the arithmetic is in its dtype.
    """
    prefix = x.shape[1] - rotation.shape[1]
    cos, sin = rotation[:, :, None]
    first, second = x[:, prefix:].to(rotation.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([x[:, :prefix], turned.to(x.dtype)], dim=1)
