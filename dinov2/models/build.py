"""Backbones from a run's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dinov2.extensions import BACKBONES
from dinov2.models.backbone import Backbone


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Backbone, Backbone, int] | tuple[Backbone, int]:
    """Build student and teacher backbones with fresh weights, on the default device.

    A backbone is given ``student.options`` and those of the other settings that its signature names; one that takes
    arbitrary keywords is given all.

    Args:
        cfg: has sections ``student``, ``crops`` and, if it comes from here, ``debug``.

    Returns:
        Student, teacher (the same without stochastic depth) and their width; with ``only_teacher`` the last two.

    Raises:
        ValueError: if the architecture is unknown, or cannot be built with these settings.
    """
    student = cfg.student
    if student.arch not in BACKBONES:
        raise ValueError(f"student.arch = {student.arch!r}: {BACKBONES.problem(student.arch)}")
    settings = {
        "img_size": cfg.crops.global_crops_size,
        "patch_size": student.patch_size,
        "init_values": student.layerscale,
        "ffn_layer": student.ffn_layer,
        "qkv_bias": student.qkv_bias,
        "proj_bias": student.proj_bias,
        "ffn_bias": student.ffn_bias,
        "num_register_tokens": student.num_register_tokens,
        "interpolate_antialias": student.interpolate_antialias,
        "interpolate_offset": student.interpolate_offset,
        "attention_backend": getattr(student, "attention_backend", "sdpa"),
        "inverse_gather": cfg.debug.inverse_gather if hasattr(cfg, "debug") else True,
    }
    drop_path = {"drop_path_rate": student.drop_path_rate, "drop_path_uniform": student.drop_path_uniform}
    make, options = BACKBONES[student.arch], dict(getattr(student, "options", {}))
    try:
        teacher = make(**_accepted(make, settings) | options)
        if only_teacher:
            return teacher, teacher.embed_dim
        return make(**_accepted(make, settings | drop_path) | options), teacher, teacher.embed_dim
    except TypeError as error:
        raise ValueError(
            f"student.arch = {student.arch!r} cannot be built with student.options = {options} ({error})."
        ) from error


def _accepted(make: Callable[..., Backbone], settings: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return settings
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in settings.items() if name in names}
