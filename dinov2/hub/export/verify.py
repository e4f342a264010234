"""An export opened by the library that it is for, and its tokens beside the teacher's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.hub.pixels import Colours, centred_square, network_input

MAX_TILES = 8
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class Agreement:
    """Distance of an export's tokens from the teacher's."""

    def __init__(self, expected: Tensor, found: Tensor) -> None:
        self.difference = float((found - expected).abs().max())  # largest one over all values of all tokens
        self.largest = float(expected.abs().max())
        self.cosine = float(torch.cosine_similarity(found, expected, dim=-1).min())  # of the worst token

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.2g} (outputs up to {self.largest:.2g}), "
            f"least cosine {self.cosine:.8f}"
        )

    def holds(self, relative: float, cosine: float) -> bool:
        """Whether it is within tolerances, see `Layout.tolerances`; never where anything is not finite."""
        return self.difference <= relative * self.largest and self.cosine >= cosine


@torch.inference_mode()
def tokens(model: nn.Module, tiles: Sequence[np.ndarray], side: int, colours: Colours) -> Tensor:
    """All normalised tokens, float64 (len(tiles), 1 + R + N, D): class token, registers, patches; on the CPU.

    The model, a teacher or what `Layout.opener` opens, becomes float64. Of each tile, uint8 (H, W, 3) RGB, the centred
    square is resized to ``side``.
    """
    model.double()
    found = []
    for tile in tiles:
        image = network_input([centred_square(tile, side)], colours, dtype=torch.float64)
        if not hasattr(model, "forward_features"):
            out = model(image).last_hidden_state
        elif not isinstance(out := model.forward_features(image), Tensor):
            out = [out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]]
            out = torch.cat(out, dim=1)
        found.append(out)
    return torch.cat(found)


def read_tiles(folder: str | None) -> list[np.ndarray]:
    """Up to `MAX_TILES` images, evenly spread over a folder's sorted names; else scikit-image's micrograph in four."""
    if folder is None:
        from skimage.data import immunohistochemistry

        tissue = immunohistochemistry()
        half = tissue.shape[0] // 2
        return [tissue[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    from PIL import Image, UnidentifiedImageError

    names = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _IMAGES)
    if not names:
        raise FileNotFoundError(f"Tiles {folder!r} are not there; a folder of {', '.join(_IMAGES)} is expected.")
    count, tiles = min(MAX_TILES, len(names)), []
    for path in (names[i * len(names) // count] for i in range(count)):
        try:
            with Image.open(path) as image:
                tiles.append(np.asarray(image.convert("RGB")))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"Tile {str(path)!r} cannot be decoded ({error}); an image is expected.") from error
    return tiles
