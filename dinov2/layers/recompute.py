"""Activations recomputed in the backward instead of kept (Chen et al., arXiv:1604.06174)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.mm,
    _ATEN.addmm,
    _ATEN.bmm,
    _ATEN.linear,
    _ATEN._scaled_mm,
    _ATEN._scaled_mm_v2,
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_cudnn_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu,
    _ATEN._flash_attention_forward,  # called directly by packages
    _ATEN._efficient_attention_forward,
}


def recomputed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Return ``forward`` with what its backward needs recomputed there.

    Args:
        forward: a pure function that draws no random numbers and changes nothing in place, such as a block's
            ``forward``. Weights that FSDP gathers have to be gathered around it.
        mode: ``none``; ``selective`` keeps the arguments and the outputs of matmuls and attention kernels,
            and repeats norms, gates, gathers and casts; ``full`` keeps the arguments only; else a ValueError.
    """
    if mode == "none":
        return forward
    if mode not in ("selective", "full"):
        raise ValueError(f"recompute = {mode!r} is unknown; choose 'none', 'selective' or 'full'.")
    options = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return functools.partial(
        _without_cast_cache, checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options
    )


def compiled_and_recomputed(
    forward: Callable[..., Any], mode: str, compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None
) -> Callable[..., Any]:
    """Return ``forward`` recomputed per ``mode`` and compiled by ``compile``, which may be None.

    Compilation is outermost: the compiler then sees what is to be kept, and leaves out of the backward what no
    gradient depends on. The other way round ``selective`` would see one opaque function and keep nothing inside.
    """
    function = recomputed(forward, mode)
    return compile(function) if compile else function


def _without_cast_cache(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` while autocast remembers no casts.

    The second pass of a step through the same weights would find them cast, and in the backward, where the memory
    is empty, not be repeated operation for operation.
    """
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    remembers = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(remembers)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "overloadpacket", None) in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
