"""A small student and teacher, several updates of them by a given class, and the same in float64 from the formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.train.update.weight_update import WeightUpdate

BETAS, EPS = (0.9, 0.95), 1e-8
# One block of the kernel and more, no multiple of four, one element, none; the last of the head is the last layer. The
# term of the loss has no teacher.
SHAPES = {
    "backbone": {"weight": (64, 40), "bias": (37,), "gain": (), "empty": (0, 3), "grid": (3, 5, 7)},
    "dino_head": {"mlp": (129, 8), "bias": (8,), "last_layer": (16, 9)},
    "term": {"weight": (8, 4), "bias": (3,)},
}
MODULES = list(SHAPES)


@dataclass(frozen=True)
class Step:
    """Inputs of one update; gradients by parameter name, None where there is none."""

    gradients: dict[str, Tensor | None]
    lr: float
    last_layer_lr: float
    wd: float
    momentum: float
    all_finite: float = 1.0

    def rates(self, name: str) -> tuple[float, float]:
        """Learning rate and weight decay of a parameter."""
        lr = self.last_layer_lr if "last_layer" in name else self.lr * (0.5 if "grid" in name else 1.0)
        return lr, 0.0 if name.endswith(("bias", "gain")) else self.wd


class _Module(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            # Every other one begins 4 bytes after a multiple of 16, as shards of a flat buffer may.
            count = torch.Size(shape).numel()
            flat = torch.randn(count + 1)
            skipped = len(self._parameters) % 2
            self.register_parameter(name, nn.Parameter(flat[skipped : skipped + count].view(shape)))


def networks() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Student and teacher with different random weights; the same at every call."""
    torch.manual_seed(0)
    student, teacher = (nn.ModuleDict({n: _Module(s) for n, s in SHAPES.items()}) for _ in range(2))
    del teacher["term"]
    return student, teacher.requires_grad_(False)


def steps(count: int = 6, scale: float = 1.0) -> list[Step]:
    """Schedules move; steps 0 to 1 have last-layer rate 0, and ``mlp`` has no gradient before step 2."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        gradients: dict[str, Tensor | None] = {
            f"{module}.{name}": scale * torch.randn(shape, generator=rng)
            for module, shapes in SHAPES.items()
            for name, shape in shapes.items()
        }
        if i < 2:
            gradients["dino_head.mlp"] = None
        found.append(Step(gradients, 1e-2 * (i + 1), 0.0 if i < 2 else 3e-2, 0.04 + 0.1 * i, 0.9 + 0.01 * i))
    return found


def optimizer_of(student: nn.ModuleDict, **options: Any) -> torch.optim.AdamW:
    """One group per parameter."""
    groups = [{"params": [parameter]} for parameter in student.parameters()]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, **{"fused": True, **options})


def set_rates(optimizer: torch.optim.AdamW, student: nn.ModuleDict, step: Step) -> None:
    """Write the step's rates into the groups of `optimizer_of`."""
    for group, (name, _) in zip(optimizer.param_groups, student.named_parameters(), strict=True):
        group["lr"], group["weight_decay"] = step.rates(name)


def run(
    kind: type[WeightUpdate],
    script: list[Step],
    max_norm: float = 3.0,
    *,
    device: str = "cpu",
    low_precision: Callable[[nn.ModuleDict, nn.ModuleDict], list[tuple[Tensor, Tensor]]] = lambda *_: [],
    adapt: Callable[[nn.Parameter, Tensor], Tensor] = lambda _, gradient: gradient,
) -> dict[str, Tensor]:
    """Weights, optimiser state, low-precision weights and each step's norms after the script, by name.

    Args:
        kind: the class under test.
        script: steps to take.
        max_norm: of the clipping.
        device: of the networks.
        low_precision: makes the pairs of a weight and its low-precision weight from student and teacher.
        adapt: changes a parameter's gradient before it is set.
    """
    student, teacher = (network.to(device) for network in networks())
    optimizer = optimizer_of(student)
    pairs = low_precision(student, teacher)
    update = kind(optimizer, student, teacher, max_norm, pairs)
    found: dict[str, Tensor] = {}
    for i, step in enumerate(script):
        set_rates(optimizer, student, step)
        for name, parameter in student.named_parameters():
            gradient = step.gradients[name]
            parameter.grad = None if gradient is None else adapt(parameter, gradient.to(device, copy=True))
        found |= {f"norm.{i}.{name}": norm for name, norm in update.grad_norms().items()}
        update.apply(step.momentum, torch.tensor(step.all_finite, device=device))
    found |= {f"copy.{i}": copy for i, (_, copy) in enumerate(pairs)}
    return found | dict(_tensors(student, teacher, optimizer))


def _tensors(
    student: nn.ModuleDict, teacher: nn.ModuleDict, optimizer: torch.optim.AdamW
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in student.named_parameters():
        yield f"student.{name}", parameter.detach()
        for key, value in optimizer.state[parameter].items():
            yield f"{key}.{name}", value
    for name, parameter in teacher.named_parameters():
        yield f"teacher.{name}", parameter.detach()


def formula(script: list[Step], max_norm: float = 3.0) -> dict[str, Tensor]:
    """What `run` has to find, in float64: AdamW (arXiv:1711.05101, algorithm 2), then the moving average."""
    student, teacher = ({n: p.detach().double() for n, p in net.named_parameters()} for net in networks())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p), 0) for name, p in student.items()}
    found: dict[str, Tensor] = {}
    for i, step in enumerate(script):
        factors = {}
        for module in MODULES:
            own = [g for n, g in step.gradients.items() if n.startswith(module) and g is not None]
            norm = sum(g.double().square().sum() for g in own) ** 0.5
            found[f"norm.{i}.{module}"] = norm
            factors[module] = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0
        if not step.all_finite:
            continue
        for name, gradient in step.gradients.items():
            theta = student[name]
            if gradient is not None:
                lr, wd = step.rates(name)
                g = gradient.double() * factors[name.split(".")[0]]
                m, v, t = moments[name]
                m, v, t = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g, t + 1
                moments[name] = (m, v, t)
                m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
                student[name] = theta - lr * m_hat / (v_hat.sqrt() + EPS) - lr * wd * theta
            if name in teacher:
                teacher[name] = step.momentum * teacher[name] + (1 - step.momentum) * student[name]
    for name, (m, v, t) in moments.items():
        if t:
            steps_made = torch.tensor(float(t))
            found |= {f"exp_avg.{name}": m, f"exp_avg_sq.{name}": v, f"step.{name}": steps_made}
    found |= {f"student.{name}": p for name, p in student.items()}
    return found | {f"teacher.{name}": p for name, p in teacher.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor is within ``tolerance`` of the expected one, relative to its largest element."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        if tensor.numel():
            error = (found[name].cpu().double() - tensor.cpu().double()).abs().max()
            assert error <= tolerance * tensor.abs().max(), (name, error, tensor.abs().max())
