"""Stop a run before a non-finite loss or gradient reaches the weights; all ranks alike, without stalling the device."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_global_rank, get_global_size

_MOST_RANGES = 4  # of samples that a sentence names


class NonFiniteError(RuntimeError):
    """The loss or a gradient norm was not finite; the update was suppressed.

    ``step`` counts as the records do, from 1; ``ranks`` are those whose losses were bad, none where the gradient was;
    ``values`` are this rank's losses and norms.
    """

    def __init__(self, message: str, step: int, ranks: Sequence[int], values: Mapping[str, float]):
        super().__init__(message)
        self.step, self.ranks, self.values = step, ranks, values


class _Observation(NamedTuple):
    step: int
    terms: dict[str, Tensor]
    scaled: bool
    bad: Tensor  # (world + 2,): the ranks' losses, gradient, asked to stop; on the host, valid once `copied` has passed
    copied: torch.cuda.Event | None


class FiniteGuard:
    """A sticky device flag: from the first non-finite step on, `all_finite` is 0 and suppresses every update.

    The host looks at a step's flag only ``delay`` steps later, when its copy has long arrived; by default 3 on a GPU,
    none on a CPU. ``device`` is that of the observed values; ``global_batch`` counts the samples of a step over all
    ranks, to name those of a bad one, in each of its ``accumulation`` micro-batches.

    By the same way ranks agree to stop: where ``stop_asked`` is set on any of them, ``stop_agreed`` becomes true on all
    after the same step. `agree_on_collapse` tells them of a collapse.
    """

    DELAY = 3  # on a GPU

    def __init__(self, device: torch.device, global_batch: int, delay: int | None = None, accumulation: int = 1):
        self.all_finite = torch.ones((), device=device)
        self._global_batch, self._accumulation, self._delay = global_batch, accumulation, delay
        if delay is None:
            self._delay = self.DELAY if device.type == "cuda" else 0
        self._pending: deque[_Observation] = deque()
        self.stop_asked = self.stop_agreed = self.collapse_agreed = False

    def observe(
        self, step: int, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], scaled: bool = False
    ) -> None:
        """Fold one step's values (0-d tensors, each to be finite) into the flag; all ranks must call.

        Raises NonFiniteError if the step observed ``delay`` steps ago was bad.

        Args:
            step: zero-based.
            losses: of this rank's samples.
            norms: of the gradient, which the ranks share and which therefore names none of them; may be empty.
            scaled: there is a loss scaler, which handles gradients that are not finite by itself.
        """
        bad = torch.zeros(get_global_size() + 2, device=self.all_finite.device)
        for rank, values in ((get_global_rank(), losses), (-2, {} if scaled else norms)):
            if values:
                stacked = torch.stack([value.detach().float() for value in values.values()])
                bad[rank] = 1 - torch.isfinite(stacked).all().float()
        bad[-1] = float(self.stop_asked)
        all_reduce_sum(bad)
        self.all_finite = self.all_finite * (bad[:-1].sum() == 0)
        host = torch.empty(bad.shape, pin_memory=bad.is_cuda).copy_(bad, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if bad.is_cuda else None
        terms = {**losses, **{f"grad_norm_{name}": norm for name, norm in norms.items()}}
        terms = {name: value.detach() for name, value in terms.items()}
        self._pending.append(_Observation(step, terms, scaled, host, copied))
        if len(self._pending) > self._delay:
            self._check(self._pending.popleft())

    def flush(self) -> None:
        """Look at every step observed so far, waiting for the device; raises NonFiniteError if one was bad."""
        while self._pending:
            self._check(self._pending.popleft())

    def agree_on_collapse(self, collapsed: bool) -> None:
        """Set ``collapse_agreed`` on all ranks where one knows of a collapse; waits for the device; all must call."""
        known = torch.full((), float(collapsed), device=self.all_finite.device)
        self.collapse_agreed |= bool(all_reduce_sum(known).item())

    def _check(self, seen: _Observation) -> None:
        if seen.copied is not None:
            seen.copied.synchronize()
        self.stop_agreed |= bool(seen.bad[-1])
        if not seen.bad[:-1].any():
            return
        first, world = seen.step * self._global_batch, get_global_size()
        ranks = seen.bad[:-2].nonzero().flatten().tolist()
        sources = [f"on rank {rank} (samples {self._samples(first, rank)})" for rank in ranks] or [
            f"in the gradient of all ranks (samples {first} to {first + self._global_batch - 1})"
        ]
        values = {name: value.item() for name, value in seen.terms.items()}
        terms = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"Step {seen.step + 1} is not finite {', '.join(sources)}; rank {get_global_rank()} has {terms}. No weight "
            f"was updated from that step on: resume from the last checkpoint. {_advice(ranks, world, seen.scaled)}",
            seen.step + 1, ranks, values,
        )  # fmt: skip

    def _samples(self, first: int, rank: int) -> str:
        """Those of a rank in a step that begins with the ``first``: consecutive ones of each micro-batch."""
        micro_batch = self._global_batch // self._accumulation
        count = micro_batch // get_global_size()
        starts = [first + number * micro_batch + rank * count for number in range(self._accumulation)]
        ranges = [f"{start} to {start + count - 1}" for start in starts[:_MOST_RANGES]]
        more = f" and those of {len(starts) - len(ranges)} more micro-batches" if len(starts) > len(ranges) else ""
        return ", ".join(ranges) + more


def _advice(ranks: Sequence[int], world: int, scaled: bool) -> str:
    """What to change if it happens again, by where it came from."""
    if scaled:
        return "If it happens again, fp16, whose range ends at 65504, is the likely cause: precision=bf16 has fp32's."
    if not ranks:
        return (
            "The losses were finite: if it happens again, the backward pass overflows, and a lower optim.base_lr or a "
            "longer warm-up may help; clipping cannot, since it divides by that norm."
        )
    if len(ranks) < world:
        return "Other ranks were finite: look at these samples first, then at optim.base_lr."
    return (
        "If the same samples do it again, look at them; if others do, the weights have grown too large: lower "
        "optim.base_lr or optim.clip_grad."
    )
