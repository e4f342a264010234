"""Image to patch tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One linear map per patch, as a strided convolution; keys ``proj.weight`` and ``proj.bias``.

    Args:
        img_size: side in pixels that the position grid is made for.
        patch_size: side of a patch in pixels.
        in_chans: colour channels.
        embed_dim: D.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, C, H, W) as (B, H/p * W/p, D), row by row.

        Raises:
            ValueError: a side is not a multiple of the patch.
        """
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The image is {height} x {width} px; both sides must be multiples of the patch size {self.patch_size}."
            )
        return self.proj(x).flatten(2).transpose(1, 2)
