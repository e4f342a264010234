"""The losses as their papers write them: loops and float64, slow, sharing nothing with the library."""

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """SwAV's iteration on the whole matrix: prototypes get 1/K each, then rows 1/N each, repeatedly."""
    num_rows, num_prototypes = logits.shape
    q = (logits.double() / temp).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / (q.sum(0, keepdim=True) * num_prototypes)
        q = q / (q.sum(1, keepdim=True) * num_rows)
    return q * num_rows


def sinkhorn_in_logs(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """The same iteration on logarithms, which no range of logits can overflow."""
    log_q = logits.double() / temp
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def cross_entropy(teacher: Tensor, student: Tensor, temp: float) -> Tensor:
    """-sum_k t_k log softmax(s / temp)_k for every row."""
    return -(teacher.double() * (student.double() / temp).log_softmax(-1)).sum(-1)


def dino_global(student: Tensor, teacher: Tensor, num_local: int, temp: float) -> Tensor:
    """Pairs of different global views; student and teacher are (V, B, K)."""
    views = range(len(teacher))
    pairs = [(s, t) for s in views for t in views if s != t]
    total = sum(cross_entropy(teacher[t], student[s], temp).mean() for s, t in pairs)
    return total / (len(pairs) + len(teacher) * num_local)


def dino_local(student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """Pairs of a local and a global view; student is (L, B, K), teacher (V, B, K)."""
    num_global, num_local = len(teacher), len(student)
    total = sum(cross_entropy(t, s, temp).mean() for s in student for t in teacher)
    return total / (num_global * num_local + num_global * (num_global - 1))


def ibot(student: Tensor, teacher: Tensor, masks: Tensor, temp: float) -> Tensor:
    """Outputs for all patches, (C, N, K); only masked ones enter, each crop's by their mean."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, mask in zip(student, teacher, masks, strict=True):
        if mask.any():
            total = total + cross_entropy(t[mask], s[mask], temp).mean()
    return total / len(masks)


def _unit(x: Tensor) -> list[Tensor]:
    return [row / row.norm() for row in x.double()]


def kde(x: Tensor, kappa: float) -> Tensor:
    """Mean log-density of each vector among the others."""
    z = _unit(x)
    densities = [
        sum(torch.exp(kappa * a.dot(b)) for j, b in enumerate(z) if j != i) / (len(z) - 1) for i, a in enumerate(z)
    ]
    return torch.stack(densities).log().mean()


def kde_as_published(x: Tensor, kappa: float) -> Tensor:
    """Minus the mean logarithm of each vector's summed kernel, its own included."""
    z = _unit(x)
    return -torch.stack([sum(torch.exp(kappa * a.dot(b)) for b in z) for a in z]).log().mean()


def koleo(x: Tensor, eps: float) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest other vector."""
    z = _unit(x)
    nearest = [torch.stack([(a - b).norm() for j, b in enumerate(z) if j != i]).min() for i, a in enumerate(z)]
    return -(torch.stack(nearest) + eps).log().mean()


def value_and_grad(loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate ``loss(x)`` and its gradient at a copy of ``x``."""
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad
