"""The image operations of ``reference_transforms`` on a batch, with parameters per image, on any device.

Images are float32 (N, 3, H, W) that hold whole levels from 0 to 255 before and after every operation; parameters
are float32 (N, 1) unless stated. Shapes depend on shapes only and nothing is read back to the host, so a chain of
operations compiles to one graph. An image's result does not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinov2.data.augment.stain import HED_FROM_RGB, RGB_FROM_HED

_LOG_EPS = math.log(1e-6)
_LOG_255 = math.log(255)
_WEIGHT_UNIT = 2**15


def resized_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut boxes, resize them to (size, size), bicubic (a = -0.5) with antialiasing, and mirror them.

    As in Pillow: first along rows, round, then along columns, round. Each is a product with a matrix of weights per
    view. It is exact in float32, TF32 and bfloat16 inputs alike and in any order of summation: weights are whole
    numbers of 1/2^15, split into two of eight bits, so every product and partial sum is a whole number below 2^24.

    Args:
        images: uint8 (B, H, W, 3); smaller images are padded below and to the right.
        boxes: (B, V, 4), (top, left, height, width) in pixels.
        flips: (B, V, 2), 1 to mirror (left-right, top-bottom).
        size: Side of the results in pixels.

    Returns:
        (V*B, 3, size, size), all first views, then all second, and so on.
    """
    batch, views = boxes.shape[:2]
    height, width = images.shape[1:3]
    top, left, box_height, box_width = boxes.unbind(2)
    columns = _resampling_weights(left, box_width, flips[..., 0], size, width).flatten(1, 2)
    rows = _resampling_weights(top, box_height, flips[..., 1], size, height)
    pixels = images.permute(0, 1, 3, 2).to(torch.float32).reshape(batch, height * 3, width)
    coarse, fine = _split(columns.transpose(1, 2))
    narrow = _levels(pixels @ coarse + pixels @ fine).view(batch, height, 3, views, size)
    narrow = narrow.permute(0, 3, 1, 2, 4).reshape(batch * views, height, 3 * size)
    coarse, fine = _split(rows.flatten(0, 1))
    resized = _levels(coarse @ narrow + fine @ narrow).view(batch, views, size, 3, size)
    return resized.permute(1, 0, 3, 2, 4).reshape(views * batch, 3, size, size)


def _resampling_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, pixels: int) -> Tensor:
    """Weights (..., size, pixels), in 1/2^15, that resize ``length`` of the pixels, from ``start``, to ``size``."""
    start, length, flip = start[..., None, None], length[..., None, None], flip[..., None, None]
    target = torch.arange(size, device=start.device, dtype=torch.float32)[:, None]
    target = torch.where(flip > 0, size - 1 - target, target)
    source = torch.arange(pixels, device=start.device, dtype=torch.float32) - start
    # |source + 1/2 - (target + 1/2) length / size| in widths of the filter; both terms are whole numbers here.
    widest = torch.clamp(length, min=size)
    distance = ((2 * source + 1) * size - (2 * target + 1) * length).abs() / (2 * widest)
    inner = (1.5 * distance - 2.5) * distance * distance + 1
    outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0.0))
    weights = torch.where((source >= 0) & (source < length), weights, 0.0)
    # In float64, since the order of this sum may change with the padding.
    total = weights.sum(-1, keepdim=True, dtype=torch.float64).to(torch.float32)
    return round_half_up(weights / total * _WEIGHT_UNIT)


def _split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two terms of whole numbers of at most eight bits (times a power of two)."""
    coarse = round_half_up(weights / 256) * 256
    return coarse, weights - coarse


def _levels(weighted: Tensor) -> Tensor:
    return round_half_up(weighted / _WEIGHT_UNIT).clamp(0, 255)


def round_half_up(values: Tensor) -> Tensor:
    """To the nearest whole number."""
    return torch.floor(values + 0.5)


def perturb_stains(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Change each stain's amount, as `stain.perturb_stains` does; ``scale`` and ``shift`` are (N, 3)."""
    # Sums of three terms instead of a matrix product, which the device may round to TF32.
    density = torch.log(images.clamp(min=255e-6) / 255).unbind(1)
    log_rgb: list[Tensor | float] = [_LOG_255] * 3
    for stain in range(3):
        amount = sum(channel * (HED_FROM_RGB[i, stain] / _LOG_EPS) for i, channel in enumerate(density))
        amount = amount.clamp(min=0) * scale[:, stain, None, None] + shift[:, stain, None, None]
        log_rgb = [total + amount * (_LOG_EPS * RGB_FROM_HED[stain, i]) for i, total in enumerate(log_rgb)]
    return round_half_up(torch.stack(log_rgb, 1).clamp(max=_LOG_255).exp())


def grayscale(images: Tensor) -> Tensor:
    """Luma (ITU-R 601) in Pillow's whole numbers, (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    # Below 2^24, so exact.
    return torch.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)[:, None]


def blend(images: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """``target + factor * (images - target)``, truncated as Pillow does.

    Args:
        images: As above.
        target: 0 black (brightness), 1 the mean grey level (contrast), 2 grey (saturation).
        factor: 1 leaves the image.
    """
    target, factor = target[..., None, None], factor[..., None, None]
    grey = grayscale(images)
    # Row sums are below 2^24, so exact; in float64 the sum of those is too, in any order.
    total = grey.sum(-1, keepdim=True).sum(-2, keepdim=True, dtype=torch.float64)
    mean = torch.floor(total / (grey.shape[-2] * grey.shape[-1]) + 0.5).to(torch.float32)
    other = torch.where(target == 2, grey, torch.where(target == 1, mean, 0.0))
    return torch.floor((other + factor * (images - other)).clamp(0, 255))


def turn_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` / 255 of the circle, through 8-bit HSV as Pillow defines it (it truncates)."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    # Just above 0, to divide by; 1/1000 keeps whole quotients whole where the device's division is approximate.
    divisor = spread.clamp(min=1)
    sector = torch.where(
        red == value,
        (green - blue) / divisor,
        torch.where(green == value, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = torch.floor(torch.remainder(sector, 6) * 42.5 + 1e-3)
    saturation = torch.floor(255 * spread / value.clamp(min=1) + 1e-3)
    turned = torch.remainder(hue + shift[..., None], 256) * (6 / 255)
    chroma = value * saturation / 255
    channels = []
    for offset in (5, 3, 1):
        position = torch.remainder(turned + offset, 6)
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp(0, 1))
    return round_half_up(torch.stack(channels, 1))


def blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur, sigma in pixels; 0 leaves the image. Borders are reflected without repeating the edge."""
    half = kernel_size // 2
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (half, half, half, half), mode="reflect")
    # Shifted sums: a convolution's algorithm, and with it its rounding, depends on the size of the batch.
    taps = kernel[:, :, None, None, None].unbind(1)
    rows = sum(tap * padded[..., i : i + width] for i, tap in enumerate(taps))
    return round_half_up(sum(tap * rows[:, :, i : i + height] for i, tap in enumerate(taps)))
