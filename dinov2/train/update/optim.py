"""AdamW over DINOv2's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov2.train.update.schedules import ScheduleValues


def parameter_groups(
    modules: Mapping[str, nn.Module], layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict]:
    """Trainable parameters grouped by learning-rate factor, weight-decay factor and last-layer membership.

    The factor of a backbone's parameter is ``layerwise_decay ** (depth + 1 - layer)``, see `Backbone.layer_of`. Norms,
    LayerScale gains and biases are not decayed; tokens, the position grid and the last layer's gain are.

    Args:
        modules: ``backbone``, heads, and terms of the loss.
        layerwise_decay: factor per layer below the top of the backbone.
        patch_embed_lr_mult: further factor for the patch embedding.

    Returns:
        Groups with keys ``params``, ``lr_multiplier``, ``wd_multiplier``, ``is_last_layer``.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = 1.0
            if module_name == "backbone":
                lr = layerwise_decay ** (len(module.blocks) + 1 - module.layer_of(name))
                lr *= patch_embed_lr_mult if name.startswith("patch_embed") else 1.0
            undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
            key = (lr, 0.0 if undecayed else 1.0, "last_layer" in name)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr_multiplier": lr, "wd_multiplier": wd, "is_last_layer": last}
        for (lr, wd, last), params in groups.items()
    ]


def build_optimizer(groups: list[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; learning rate and decay are set every step by `apply_schedule`."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, values: ScheduleValues) -> None:
    """Write the step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.wd * group["wd_multiplier"]


def adam_state(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's ``step``, ``exp_avg`` and ``exp_avg_sq`` by parameter name, zeros where no step was made yet.

    The tensors are the optimiser's own: filling them restores it.
    """
    names = {p: f"{module}.{name}" for module in modules for name, p in modules[module].named_parameters()}
    return {names[p]: dict(state_of(optimizer, p)) for group in optimizer.param_groups for p in group["params"]}


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter, begun as AdamW begins it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
