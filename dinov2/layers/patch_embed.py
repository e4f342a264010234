"""Images to patch tokens."""

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One linear map for all patches, written as a strided convolution; sizes are sides in pixels.

    Raises ValueError if ``img_size``, for which the position grid is made, is not a multiple of ``patch_size``.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(
                f"img_size = {img_size} is not a multiple of patch_size = {patch_size}; choose one that is."
            )
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W) of any dtype as patches (B, H/p * W/p, D), row by row.

        Raises ValueError for another shape, or a side that is not a multiple of the patch.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"Images are {tuple(x.shape)}; (B, {self.in_chans}, H, W) is expected.")
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Images of {height} x {width} px do not divide into patches of {self.patch_size} px; "
                "both sides must be multiples of it."
            )
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
