"""What the two regularisers that spread class tokens over the sphere start from."""

import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import all_gather_rows


def unit_rows(student_output: Tensor, gather: bool) -> Tensor:
    """Normalise (B, D) rows to length 1, in float64, and join those of all ranks where asked.

    The matrices that follow are batch by batch, so float64 costs nothing, and it is out of reach of autocast
    and TF32, which would blur the distance between near neighbours.

    Args:
        student_output: (B, D), any float dtype.
        gather: join the rows of all ranks, see `all_gather_rows`; all ranks must then call with equal B.

    Returns:
        (N, D) float64, N = B or world * B.

    Raises:
        ValueError: there are fewer than 2 rows.
    """
    rows = F.normalize(student_output.double(), dim=-1)
    rows = all_gather_rows(rows) if gather else rows
    if len(rows) < 2:
        raise ValueError(f"spreading class tokens needs at least 2 images in the batch, got {len(rows)}")
    return rows
