"""Backbones from a run's configuration."""

from __future__ import annotations

from typing import Any

from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer


def build_model_from_cfg(
    cfg: Any, only_teacher: bool = False
) -> tuple[DinoVisionTransformer, DinoVisionTransformer, int] | tuple[DinoVisionTransformer, int]:
    """Build student and teacher backbones with fresh weights, on the default device.

    Args:
        cfg: has sections ``student``, ``crops`` and, if it comes from here, ``debug``.
        only_teacher: leave the student out.

    Returns:
        Student, teacher (the same without stochastic depth) and their width; with ``only_teacher`` the last two.

    Raises:
        ValueError: the architecture is unknown.
    """
    student = cfg.student
    arguments = {
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
    if student.arch not in ARCHITECTURES:
        raise ValueError(f"student.arch is {student.arch!r}; one of {', '.join(ARCHITECTURES)} is expected.")
    build = ARCHITECTURES[student.arch]
    teacher = build(**arguments)
    if only_teacher:
        return teacher, teacher.embed_dim
    drop_path = {"drop_path_rate": student.drop_path_rate, "drop_path_uniform": student.drop_path_uniform}
    return build(**arguments, **drop_path), teacher, teacher.embed_dim
