"""Linear heads on frozen features, under two published protocols."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dinov2.configs.fields import key
from dinov2.eval.probe.results import Result
from dinov2.eval.probe.task import Fold, Probe, TaskFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Protocol:
    """Training of a head."""

    optimizer: str  # sgd (Nesterov 0.9, no weight decay) or adamw (weight decay 0.01)
    lr: float  # at `batch`; SGD's scales with the batch
    batch: int  # rows per step
    small_batch: int  # rows per step where the training part is smaller than `batch`
    cosine: bool  # let the learning rate fall to zero over all steps along half a cosine; else it is constant
    patience: float  # fraction of the epochs without a better validation after which a run stops
    steps: int = 12_500  # at most


KAIKO = Protocol("sgd", lr=0.01, batch=4096, small_batch=256, cosine=True, patience=1 / 20)
"""Of kaiko's paper (arXiv:2404.15217, table VI)."""
EVA = Protocol("adamw", lr=3e-4, batch=256, small_batch=256, cosine=False, patience=1 / 5)
"""Of kaiko-eva 0.4.5's configurations."""


class LinearEva(Probe):
    """Linear heads as kaiko-eva trains them."""

    name: ClassVar[str] = "linear_eva"
    protocol: ClassVar[Protocol] = EVA

    @dataclass(frozen=True)
    class Options:
        """Numbers of heads and steps."""

        runs: int = key(5, "linear heads of different seeds", least=1)
        steps: int = key(12_500, "steps of a linear head, at most", least=1)

    def measure(self, task: TaskFeatures) -> list[Result]:
        """Train heads on every division and classify by each."""
        runs, protocol = self.options.runs, replace(self.protocol, steps=self.options.steps)

        def scores(fold: Fold) -> Tensor:
            seed = task.probing.seed + fold.number * runs
            return train_heads(fold.train, fold.val, fold.classes, protocol, runs, seed).scores(fold.test)

        return task.classify(self.name, scores)


class LinearKaiko(LinearEva):
    """Linear heads as kaiko's paper trains them."""

    name = "linear_kaiko"
    protocol = KAIKO


@dataclass(frozen=True)
class Head:
    """R linear heads."""

    weight: Tensor  # float32 (R, D, C)
    bias: Tensor  # float32 (R, 1, C)
    step: Tensor  # after which each head's validation was best, int64 (R,)
    accuracy: Tensor  # balanced, on validation, float32 (R,)

    def scores(self, features: Tensor) -> Tensor:
        """Class probabilities, float32 (R, N, C)."""
        return (features.float() @ self.weight + self.bias).softmax(-1)


def train_heads(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    protocol: Protocol,
    runs: int = 5,
    seed: int = 0,
) -> Head:
    """Train heads from different seeds side by side, and keep each at its best validation.

    After every epoch the balanced accuracy on validation is taken; of equal ones the first counts. Random numbers
    come from generators of this call's own; run r has seed ``seed + r``. The rows to fit on and those to choose on are
    features (N, D) and class numbers, int64 (N,).
    """
    import torch
    from torch.nn.functional import cross_entropy

    features, labels = train[0].float(), train[1]
    count, width = features.shape
    batch = protocol.batch if count >= protocol.batch else protocol.small_batch
    generators = [torch.Generator().manual_seed(seed + run) for run in range(runs)]
    bound = 1 / math.sqrt(width)  # as `nn.Linear` draws them
    drawn = [
        [torch.empty(*shape).uniform_(-bound, bound, generator=g) for shape in ((width, classes), (1, classes))]
        for g in generators
    ]
    parameters = [torch.stack(parts).to(features.device).requires_grad_() for parts in zip(*drawn, strict=True)]
    if protocol.optimizer == "adamw":
        peak, optimizer = protocol.lr, torch.optim.AdamW(parameters, lr=protocol.lr, weight_decay=0.01)
    else:
        peak = protocol.lr * batch / protocol.batch
        optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, nesterov=True)
    epoch_steps = -(-count // batch)
    patience = epoch_steps * max(1, round(protocol.patience * protocol.steps / epoch_steps))
    nothing_yet = torch.zeros(runs, dtype=torch.int64), torch.full((runs,), -1.0)
    best = Head(*(value.detach().clone().to(features.device) for value in (*parameters, *nothing_yet)))
    step = 0
    with torch.enable_grad():
        while step < protocol.steps and bool((step - best.step < patience).any()):
            orders = torch.stack([torch.randperm(count, generator=g) for g in generators]).to(features.device)
            for rows in orders.split(batch, dim=1)[: protocol.steps - step]:
                if protocol.cosine:
                    fraction = (1 + math.cos(math.pi * step / protocol.steps)) / 2
                    optimizer.param_groups[0]["lr"] = peak * fraction
                logits = torch.baddbmm(parameters[1], features[rows], parameters[0])
                loss = cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
                optimizer.zero_grad()
                (loss * runs).backward()  # each head's own mean over its batch
                optimizer.step()
                step += 1
            best = _better(best, parameters, val, classes, step, patience)
    return best


def _better(
    best: Head, parameters: list[Tensor], val: tuple[Tensor, Tensor], classes: int, step: int, patience: int
) -> Head:
    """The best heads after a validation; those of runs that have lost patience stay as they are."""
    import torch
    from torch.nn.functional import one_hot

    weight, bias = (parameter.detach() for parameter in parameters)
    target = one_hot(val[1], classes).float()
    predicted = (val[0].float() @ weight + bias).argmax(-1)
    right = (predicted == val[1]).float() @ target  # (R, C)
    present = target.sum(0) > 0
    accuracy = (right[:, present] / target.sum(0)[present]).mean(1)
    wins = (accuracy > best.accuracy) & (step - best.step <= patience)
    chosen = wins[:, None, None]
    return Head(
        torch.where(chosen, weight, best.weight),
        torch.where(chosen, bias, best.bias),
        torch.where(wins, step, best.step),
        torch.where(wins, accuracy, best.accuracy),
    )
