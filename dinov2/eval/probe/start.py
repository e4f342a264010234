"""The random weights that a run starts from, to probe what a teacher is worth beside having learned nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dinov2.configs import load_config
from dinov2.configs.loader import config_from_mapping, saved_config
from dinov2.hub.record import read_record
from dinov2.models import build_model_from_cfg

RANDOM = "random:"


def random_start(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone that a configuration names as a run builds it before its first step, published weights apart.

    The weights are those of the seed ``train.seed``. Random states are left as they were. The source is a configuration
    (``.yaml``), or a teacher that training exported, whose JSON holds it. Returned are the teacher in evaluation mode,
    on the CPU, and what `dinov2.hub.trained_with` tells of others.

    Raises FileNotFoundError if there is no such configuration; ValueError if it does not fit the schema, or the
    teacher's JSON holds none.
    """
    if source.endswith((".yaml", ".yml")):
        config = load_config(source)
    else:
        record = read_record(source)
        saved = record.get("config") if isinstance(record, Mapping) else None
        if not (isinstance(saved, Mapping) and "student" in saved):
            raise ValueError(
                f"'{source}' is neither a .yaml nor a teacher beside which a JSON holds the configuration of its run."
            )
        config = config_from_mapping(saved_config(saved))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.train.seed)
        # Both, as training does: the teacher is built first and then takes the student's weights.
        student, teacher, _ = build_model_from_cfg(config)
        teacher.load_state_dict(student.state_dict())
    augmentation = config.augmentation
    trained = {"step": 0, "size": config.crops.global_crops_size}
    return teacher.eval(), trained | {"mean": augmentation.normalize_mean, "std": augmentation.normalize_std}
