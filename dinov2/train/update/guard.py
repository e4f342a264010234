"""Stop a run before a non-finite loss or gradient reaches the weights; all ranks alike, without stalling the device."""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_rank, get_global_size


class NonFiniteError(RuntimeError):
    """The loss or a gradient norm was not finite; the update was suppressed."""


class _Observation(NamedTuple):
    step: int
    terms: dict[str, Tensor]
    bad: Tensor  # (world + 2,): the ranks' losses, gradient, asked to stop; on the host, valid once `copied` has passed
    copied: torch.cuda.Event | None


class FiniteGuard:
    """A sticky device flag: from the first non-finite step on, `all_finite` is 0 and suppresses every update.

    The host looks at a step's flag only ``delay`` steps later, when its copy has long arrived; by default 3 on a GPU,
    none on a CPU. ``device`` is that of the observed values; ``global_batch`` counts the samples of a step over all
    ranks, to name those of a bad one.

    By the same way ranks agree to stop: where ``stop_asked`` is set on any of them, ``stop_agreed`` becomes true on all
    after the same step.
    """

    def __init__(self, device: torch.device, global_batch: int, delay: int | None = None):
        self.all_finite = torch.ones((), device=device)
        self._global_batch, self._delay = global_batch, delay
        if delay is None:
            self._delay = 3 if device.type == "cuda" else 0
        self._pending: deque[_Observation] = deque()
        self.stop_asked = self.stop_agreed = False

    def observe(self, step: int, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Fold one step's values (0-d tensors, each to be finite) into the flag; all ranks must call.

        Raises NonFiniteError if the step observed ``delay`` steps ago was bad.

        Args:
            step: zero-based.
            losses: of this rank's samples.
            norms: of the gradient, which the ranks share and which therefore names none of them; may be empty.
        """
        bad = torch.zeros(get_global_size() + 2, device=self.all_finite.device)
        for rank, values in ((get_global_rank(), losses), (-2, norms)):
            if values:
                stacked = torch.stack([value.detach().float() for value in values.values()])
                bad[rank] = 1 - torch.isfinite(stacked).all().float()
        bad[-1] = float(self.stop_asked)
        all_reduce_sum(bad)
        self.all_finite = self.all_finite * (bad[:-1].sum() == 0)
        host = torch.empty(bad.shape, pin_memory=bad.is_cuda).copy_(bad, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if bad.is_cuda else None
        terms = {name: value.detach() for name, value in {**losses, **norms}.items()}
        self._pending.append(_Observation(step, terms, host, copied))
        if len(self._pending) > self._delay:
            self._check(self._pending.popleft())

    def flush(self) -> None:
        """Look at every step observed so far, waiting for the device; raises NonFiniteError if one was bad."""
        while self._pending:
            self._check(self._pending.popleft())

    def _check(self, seen: _Observation) -> None:
        if seen.copied is not None:
            seen.copied.synchronize()
        self.stop_agreed |= bool(seen.bad[-1])
        if not seen.bad[:-1].any():
            return
        first, count = seen.step * self._global_batch, self._global_batch // get_global_size()
        sources = [
            f"on rank {rank} (samples {first + rank * count} to {first + (rank + 1) * count - 1})"
            for rank in seen.bad[:-2].nonzero().flatten().tolist()
        ] or [f"in the gradient of all ranks (samples {first} to {first + self._global_batch - 1})"]
        terms = ", ".join(f"{name} = {value.item():g}" for name, value in seen.terms.items())
        raise NonFiniteError(
            f"Step {seen.step} is not finite {', '.join(sources)}; rank {get_global_rank()} has {terms}. No weight "
            "was updated from that step on: resume from the last checkpoint, with a lower optim.base_lr or "
            "optim.clip_grad if it happens again."
        )
