"""The kernels that attention can run on.

Each maps queries, keys and values (B, N, H, D / H) to attended values of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_backend(name: str) -> Attend:
    """Return the attention function called ``name``, after making sure that it can be used here.

    Raises:
        ValueError: the name is unknown, or the backend lacks its device or its package.
    """
    if name == "sdpa":
        return _sdpa
    if name == "xformers":
        _require_xformers()
        return _xformers
    raise ValueError(f"attention_backend = {name!r} is unknown; choose 'sdpa' or 'xformers'.")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(q, k, v)
    except NotImplementedError as error:  # the build has no kernel for this torch, device or dtype
        raise ValueError(
            f"attention_backend = 'xformers' has no kernel here for {q.dtype} on {q.device} ({_one_line(error)}); "
            f"install the xformers build made for torch {torch.__version__}, or choose 'sdpa'."
        ) from error


def _require_xformers() -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            "attention_backend = 'xformers' needs a CUDA device and there is none; choose 'sdpa'."
        )
    try:
        from xformers.ops import memory_efficient_attention  # noqa: F401
    except Exception as error:  # a build for another torch fails in its loader, with whatever that raises
        raise ValueError(
            f"attention_backend = 'xformers' cannot be imported beside torch {torch.__version__} "
            f"({_one_line(error)}); install the xformers build made for it, or choose 'sdpa'."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
