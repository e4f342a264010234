"""The kernels that attention can run on.

Each maps queries, keys and values (B, N, H, D / H) to attended values of the same shape.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ON_CPU = ("sdpa", "flash", "math")


def attention_backend(name: str) -> Attend:
    """Return the attention function called ``name``, after making sure that it can be used here.

    ``sdpa`` lets PyTorch choose among its kernels for each shape and dtype; ``flash``, ``cudnn``, ``efficient`` and
    ``math`` are those kernels, of which the CPU has ``flash`` and ``math``; ``xformers`` is the package's.

    Raises ValueError if the name is unknown, or the backend lacks its device or its package; the function returned
    raises it where the backend has no kernel for what it is given.
    """
    if name not in (known := ("sdpa", *_KERNELS, "xformers")):
        choices = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise ValueError(f"attention_backend = {name!r} is unknown; choose {choices}.")
    if name not in _ON_CPU and not torch.cuda.is_available():
        raise ValueError(f"attention_backend = {name!r} needs a CUDA device and there is none; choose 'sdpa'.")
    if name == "sdpa":
        return _sdpa
    if name != "xformers":
        return functools.partial(_one_kernel, name)
    try:
        from xformers.ops import memory_efficient_attention
    except Exception as error:  # a build for another torch fails in its loader, with whatever that raises
        raise ValueError(
            f"attention_backend = 'xformers' cannot be imported beside torch {torch.__version__} "
            f"({_one_line(error)}); install the xformers build made for it, or choose 'sdpa'."
        ) from error
    return functools.partial(_xformers, memory_efficient_attention)


def require_kernel(name: str, *, head_width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Attend once to a few zeros: inside a compiled block what `attention_backend` raises comes out unreadable.

    Raises ValueError as that does, or if there is no kernel for this width, dtype and device.
    """
    q = torch.zeros(1, 8, 1, head_width, dtype=dtype, device=device, requires_grad=True)
    attention_backend(name)(q, q, q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _one_kernel(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        with sdpa_kernel(_KERNELS[name]):
            return _sdpa(q, k, v)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        raise ValueError(
            f"attention_backend = {name!r} has no kernel here for {q.dtype} on {q.device} with heads {q.shape[-1]} "
            "wide; choose 'sdpa'."
        ) from error


def _xformers(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        return attend(q, k, v)
    except NotImplementedError as error:  # the build has no kernel for this torch, device or dtype
        raise ValueError(
            f"attention_backend = 'xformers' has no kernel here for {q.dtype} on {q.device} ({_one_line(error)}); "
            f"install the xformers build made for torch {torch.__version__}, or choose 'sdpa'."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
