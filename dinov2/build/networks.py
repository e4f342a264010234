"""Starting weights of a network from a configuration."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from dinov2.configs import Config
from dinov2.hub.pretrained import load_pretrained, published_url, read_checkpoint

logger = logging.getLogger("dinov2")


def load_starting_weights(network: nn.ModuleDict, config: Config) -> None:
    """Fill a network from the weights that the configuration names, if any.

    ``MODEL.WEIGHTS`` is a teacher export (backbone, and heads where it holds them); otherwise
    ``student.pretrained_weights`` or, under ``train.use_pretrained``, Meta's published file fill the backbone.

    Args:
        network: ``backbone`` and heads, whole.
        config: validated configuration.

    Raises:
        FileNotFoundError, ValueError: if the weights are missing or do not fit.
    """
    weights = starting_weights(config)
    if config.MODEL.WEIGHTS:
        load_export(network, weights)
    elif weights:
        load_pretrained(network.backbone, weights, config.student.pretrained_pos_embed)
        logger.info("Backbone initialised from %s.", weights)


def starting_weights(config: Config) -> str:
    """Path or URL of the weights that the configuration names, or an empty text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if none are published for this architecture.
    """
    student = config.student
    if config.train.use_pretrained:
        return published_url(student.arch, student.patch_size, student.num_register_tokens, student.ffn_layer)
    for key, weights in (("MODEL.WEIGHTS", config.MODEL.WEIGHTS),
                         ("student.pretrained_weights", student.pretrained_weights)):  # fmt: skip
        if weights and "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"{key} = {weights!r} is no file; give the path or URL of a .pth file.")
    return config.MODEL.WEIGHTS or student.pretrained_weights


def load_export(network: nn.ModuleDict, path: str) -> None:
    """Fill a network from a teacher export: the backbone always, each head that the file holds.

    Raises:
        ValueError: if a head's shapes differ, or the backbone does not fit.
    """
    load_pretrained(network.backbone, path)
    teacher = read_checkpoint(path).get("teacher", {})
    loaded = ["backbone"]
    for name in ("dino_head", "ibot_head"):
        head = {key.removeprefix(f"{name}."): value for key, value in teacher.items() if key.startswith(f"{name}.")}
        if not head or name not in network:
            continue
        try:
            network[name].load_state_dict(head)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"MODEL.WEIGHTS = {path!r} holds a {name} that does not fit ({detail}).") from error
        loaded.append(name)
    logger.info("%s initialised from %s.", ", ".join(loaded), path)
