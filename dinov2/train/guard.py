"""Stop a run before a non-finite loss or gradient reaches the weights, without stalling the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_rank, get_global_size


class NonFiniteError(RuntimeError):
    """The loss or a gradient norm was not finite; the update was suppressed."""


@dataclass(frozen=True)
class _Observation:
    step: int
    terms: dict[str, Tensor]
    bad_ranks: Tensor  # (world,) on the host; valid once `copied` has passed
    copied: torch.cuda.Event | None


class FiniteGuard:
    """A sticky device flag: from the first non-finite step on, `healthy` is 0 and suppresses every update.

    The host looks at a step's flag only ``delay`` steps later, when its copy has long arrived.

    Args:
        device: of the observed values.
        global_batch: samples per step over all ranks, to name the samples of a bad step.
        delay: steps between the observation of a step and the host's look at it.
    """

    def __init__(self, device: torch.device, global_batch: int, delay: int = 3):
        self.healthy = torch.ones((), device=device)
        self._global_batch = global_batch
        self._delay = delay
        self._pending: deque[_Observation] = deque()

    def observe(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Fold one step's values (0-d tensors, each to be finite) into the flag; all ranks must call.

        Raises:
            NonFiniteError: the step observed ``delay`` steps ago was bad.
        """
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values.values()])).all()
        bad_ranks = torch.zeros(get_global_size(), device=finite.device)
        bad_ranks[get_global_rank()] = 1 - finite.float()
        all_reduce_sum(bad_ranks)
        self.healthy = self.healthy * (bad_ranks.sum() == 0)
        host = torch.empty(bad_ranks.shape, pin_memory=finite.is_cuda).copy_(bad_ranks, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if finite.is_cuda else None
        self._pending.append(_Observation(step, {k: v.detach() for k, v in values.items()}, host, copied))
        if len(self._pending) > self._delay:
            self._check(self._pending.popleft())

    def flush(self) -> None:
        """Look at every step observed so far, waiting for the device.

        Raises:
            NonFiniteError: one of them was bad.
        """
        while self._pending:
            self._check(self._pending.popleft())

    def _check(self, seen: _Observation) -> None:
        if seen.copied is not None:
            seen.copied.synchronize()
        if not seen.bad_ranks.any():
            return
        share = self._global_batch // get_global_size()
        places = []
        for rank in seen.bad_ranks.nonzero().flatten().tolist():
            first = seen.step * self._global_batch + rank * share
            places.append(f"rank {rank} (samples {first} to {first + share - 1})")
        terms = ", ".join(f"{name} = {value.item():g}" for name, value in seen.terms.items())
        raise NonFiniteError(
            f"Step {seen.step} is not finite on {', '.join(places)}; rank {get_global_rank()} has {terms}. No weight "
            "was updated from that step on: resume from the last checkpoint, with a lower optim.base_lr or "
            "optim.clip_grad if it happens again."
        )
