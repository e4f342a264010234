"""Starting weights of a network from a configuration."""

import logging
from pathlib import Path

from torch import nn

from dinov2.configs import Config
from dinov2.hub.pretrained import load_pretrained, published_url, read_checkpoint

logger = logging.getLogger("dinov2")


def load_starting_weights(network: nn.ModuleDict, config: Config) -> None:
    """Fill a network, whole ``backbone`` and heads, from the weights that the configuration names, if any.

    ``MODEL.WEIGHTS`` is a teacher export, of which the backbone and each head that it holds are taken; otherwise
    ``student.pretrained_weights`` or, under ``train.use_pretrained``, Meta's published file fill the backbone. Raises
    as `starting_weights`, and ValueError if they do not fit.
    """
    path = starting_weights(config)
    if not path:
        return
    load_pretrained(network.backbone, path, bool(config.MODEL.WEIGHTS) or config.student.pretrained_pos_embed)
    teacher = read_checkpoint(path).get("teacher", {}) if config.MODEL.WEIGHTS else {}
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
    logger.info("Initialised from %s: %s.", path, ", ".join(loaded))


def starting_weights(config: Config) -> str:
    """Path or URL of the weights that the configuration names, or an empty text.

    FileNotFoundError if there is no such file, ValueError if none are published for this architecture.
    """
    student, export = config.student, config.MODEL.WEIGHTS
    if config.train.use_pretrained:
        return published_url(student.arch, student.patch_size, student.num_register_tokens, student.ffn_layer)
    for key, weights in (("MODEL.WEIGHTS", export), ("student.pretrained_weights", student.pretrained_weights)):
        if weights and "://" not in weights and not Path(weights).is_file():
            raise FileNotFoundError(f"{key} = {weights!r} is no file; give the path or URL of a .pth file.")
    return export or student.pretrained_weights
