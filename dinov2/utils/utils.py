"""The cosine schedule of DINO and DINOv2, under the import path that notebooks use."""

import math
from dataclasses import dataclass


@dataclass
class CosineScheduler:
    """Value per iteration: zeros while frozen, a linear warm-up, then a half cosine; computed on request.

    With F = freeze_iters, W = warmup_iters, T = total_iters:

        v[i] = 0                                                             i < F
        v[i] = start + (base - start) * (i - F) / (W - 1)                    F <= i < F + W
        v[i] = final + (base - final) / 2 * (1 + cos(pi * j / (T - F - W)))  j = i - F - W,  i < T
        v[i] = final                                                         i >= T
    """

    base_value: float
    final_value: float
    total_iters: int
    warmup_iters: int = 0
    start_warmup_value: float = 0.0
    freeze_iters: int = 0

    def __post_init__(self) -> None:
        if self.total_iters < self.warmup_iters + self.freeze_iters:
            raise ValueError(
                f"A schedule of {self.total_iters} iterations cannot hold {self.freeze_iters} frozen and "
                f"{self.warmup_iters} warm-up iterations; give at least their sum."
            )

    def __len__(self) -> int:
        return self.total_iters

    def __getitem__(self, it: int) -> float:
        """Value at iteration ``it`` (0-based)."""
        if it >= self.total_iters:
            return self.final_value
        if it < self.freeze_iters:
            return 0.0
        it -= self.freeze_iters
        if it < self.warmup_iters:
            fraction = it / (self.warmup_iters - 1) if self.warmup_iters > 1 else 0.0
            return self.start_warmup_value + (self.base_value - self.start_warmup_value) * fraction
        it -= self.warmup_iters
        span = self.total_iters - self.freeze_iters - self.warmup_iters
        return self.final_value + 0.5 * (self.base_value - self.final_value) * (1 + math.cos(math.pi * it / span))
