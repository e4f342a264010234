"""Starting weights of a network from a configuration."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dinov2.configs import Config
from dinov2.configs.schema import StudentConfig
from dinov2.hub.locate import hub_id, is_here, weights_path
from dinov2.hub.pretrained import (
    check_finite,
    check_found,
    check_shapes,
    head_state_dict,
    is_url,
    load_pretrained,
    needs_download,
    published_url,
    read_checkpoint,
    starting_state,
)
from dinov2.models.backbone import build_model_from_cfg, ignored_settings

logger = logging.getLogger("dinov2")


def load_starting_weights(network: nn.ModuleDict, config: Config) -> list[str]:
    """Fill a network, whole ``backbone`` and heads, from the weights that the configuration names; list what was.

    ``MODEL.WEIGHTS`` is a teacher export, of which the backbone and each head that it holds are taken; otherwise
    ``student.pretrained_weights`` or, under ``train.use_pretrained``, Meta's published file fill the backbone. The
    position grid stays as it starts without ``student.pretrained_pos_embed``. Raises as `starting_weights`, and
    ValueError if they do not fit or are not finite.
    """
    path = starting_weights(config)
    if not path:
        return []
    checkpoint = load_pretrained(network.backbone, path, config.student.pretrained_pos_embed)
    loaded = ["backbone" if config.student.pretrained_pos_embed else "backbone but its position grid"]
    for name in ("dino_head", "ibot_head") if config.MODEL.WEIGHTS else ():
        head = head_state_dict(checkpoint, name)
        if not head or name not in network:
            continue
        check_finite({f"{name}.{key}": value for key, value in head.items()}, path)
        try:
            network[name].load_state_dict(head)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise ValueError(f"MODEL.WEIGHTS = {path!r} holds a {name} that does not fit ({detail}).") from error
        loaded.append(name)
    return loaded


def load_gram_teacher(backbone: nn.Module, weights: str) -> None:
    """Fill the gram teacher from weights of its architecture; raises ValueError, which names the key, or OSError."""
    try:
        load_pretrained(backbone, weights)
    except ValueError as error:
        raise _of_gram_teacher(error) from error


def gram_weights(config: Config) -> str:
    """Path, id on the hub or URL of the gram teacher's weights, or an empty text; FileNotFoundError without a file."""
    gram = config.losses.get("gram")
    weights = gram.ckpt if gram is not None and gram.is_used else ""
    _check_is_file("losses.gram.ckpt", weights)
    return weights


def _of_gram_teacher(error: ValueError) -> ValueError:
    return ValueError(f"losses.gram.ckpt, the gram teacher, must be of the student's architecture: {error}")


def starting_weights(config: Config) -> str:
    """Path, id on the hub or URL of the weights that the configuration names, or an empty text.

    FileNotFoundError or IsADirectoryError if there is no such file here, ValueError if none are published for this
    architecture.
    """
    student, export = config.student, config.MODEL.WEIGHTS
    if config.train.use_pretrained:
        return published_url(student.arch, student.patch_size, student.num_register_tokens, student.ffn_layer)
    for key, weights in (("MODEL.WEIGHTS", export), ("student.pretrained_weights", student.pretrained_weights)):
        _check_is_file(key, weights)
    return export or student.pretrained_weights


def _check_is_file(key: str, weights: str) -> None:
    if weights and "://" not in weights and not hub_id(weights) and not weights_path(weights).is_file():
        raise FileNotFoundError(
            f"{key} = {weights!r} is no file; give a file, a folder, an id on the Hugging Face hub or a URL."
        )


def check_backbone(config: Config, with_weights: bool = True) -> None:
    """Make sure that the backbone can be built and, where its starting weights are here, that they fit it.

    Those of the gram teacher are looked at, too.

    Nothing is allocated but what reading a file takes. Settings that the backbone does not take are logged. Raises
    ValueError, or as `starting_weights` and `read_checkpoint`.
    """
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(config, only_teacher=True)
    student, usual = config.student, StudentConfig()
    for name in ignored_settings(config):
        if getattr(student, name) != getattr(usual, name):
            logger.warning(
                "student.%s = %r has no effect on %s; what it takes goes into student.options.",
                name, getattr(student, name), student.arch,
            )  # fmt: skip
    if not with_weights:
        return
    _check_weights(backbone, starting_weights(config), config.student.pretrained_pos_embed)
    weights = gram_weights(config)
    try:
        _check_weights(backbone, weights)
    except ValueError as error:
        raise _of_gram_teacher(error) from error


def _check_weights(backbone: nn.Module, path: str, positions: bool = True) -> None:
    if path and not is_url(path) and is_here(path):
        state, _ = starting_state(backbone, read_checkpoint(path), positions)
        check_shapes(backbone, state, path)


def try_starting_weights(network: nn.ModuleDict, gram_teacher: nn.Module | None, config: Config) -> list[str]:
    """Open the weights that a configuration names and look whether they fit and are finite, in a sentence each.

    Networks, the student and the gram teacher's backbone, are on the meta device: what loads them at the start of a run
    does all but keep the values. Weights elsewhere are asked for, not downloaded. Raises as `load_starting_weights`,
    `load_gram_teacher` and `check_found`.
    """
    told = []
    if path := starting_weights(config):
        if needs_download(path):
            check_found(path)
            told.append(f"Weights: {path} is there; it is downloaded, opened and checked when the run starts.")
        else:
            loaded = _without_values(lambda: load_starting_weights(network, config))
            told.append(f"Weights: {path} holds {', '.join(loaded)}, of the right shapes and finite.")
    if (weights := gram_weights(config)) and gram_teacher is not None:
        if needs_download(weights):
            check_found(weights)
            told.append(f"Gram teacher: {weights} is there; it is downloaded, opened and checked when the run starts.")
        else:
            _without_values(lambda: load_gram_teacher(gram_teacher, weights))
            told.append(f"Gram teacher: {weights} is of the right shapes and finite.")
    return told or ["Weights: none are named, so that training starts from random ones."]


def _without_values(load: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a meta parameter.*")  # which keeps no values, as is meant here
        return load()
