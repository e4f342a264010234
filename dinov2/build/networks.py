"""Starting weights of a network from a configuration."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dinov2.configs import Config
from dinov2.configs.schema import StudentConfig
from dinov2.extensions import LOSSES
from dinov2.hub.locate import hub_id, is_here, teacher_file, weights_path
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
from dinov2.hub.record import normalisation
from dinov2.hub.teacher import open_backbone
from dinov2.loss import TermWithTeacher
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


def load_frozen_teacher(backbone: nn.Module, key: str, weights: str) -> None:
    """Fill the frozen teacher of a term from weights of its architecture, which ``key`` names.

    Raises ValueError, which names the key, or OSError.
    """
    try:
        load_pretrained(backbone, weights)
    except ValueError as error:
        raise ValueError(f"{key}, a frozen teacher: {error}") from error


def frozen_teachers(config: Config) -> Iterator[tuple[str, str, str, bool]]:
    """Name, key and weights of each term with a frozen teacher that has some, and whether it is of the student's kind.

    Weights are a path, an id on the hub or a URL, and may be absent.
    """
    for name, options in config.losses.items():
        term = LOSSES[name]
        if not (isinstance(term, type) and issubclass(term, TermWithTeacher) and options.is_used):
            continue
        if weights := getattr(options, term.weights_option):
            yield name, f"losses.{name}.{term.weights_option}", weights, term.follows_teacher


def with_teachers(config: Config) -> Config:
    """A configuration in which terms with a frozen teacher of another kind than the student's say what it is.

    That is, where they leave it open, its architecture and normalisation, as its weights tell; they are downloaded
    where they are not here. A run's folder as the weights is its newest teacher. Raises OSError, and ValueError where
    they are no backbone, are not finite, or their patches do not fit the crops.
    """
    losses = dict(config.losses)
    for name, key, weights, follows in frozen_teachers(config):
        if follows:
            continue
        _check_is_file(key, weights)
        options, given = losses[name], config.losses[name].architecture
        weights = teacher_file(weights)
        try:
            if not given:
                given = _architecture(weights)
            mean, std, _ = normalisation(weights, options.normalize_mean, options.normalize_std)
        except ValueError as error:
            raise ValueError(f"{key}, a frozen teacher: {error}") from error
        losses[name] = dataclasses.replace(
            options, teacher=weights, architecture=given, normalize_mean=mean, normalize_std=std
        )
        _check_patches(config, name, losses[name])
    return dataclasses.replace(config, losses=losses) if losses else config


def _architecture(weights: str) -> dict[str, Any]:
    backbone, _ = open_backbone(weights)
    eps = {module.eps for module in backbone.modules() if isinstance(module, nn.LayerNorm)}
    return backbone.describe() | ({"layer_norm_eps": eps.pop()} if len(eps) == 1 else {})


def _check_patches(config: Config, name: str, options: Any) -> None:
    with torch.device("meta"):
        patch = options.build().patch_size
    size, key = options.crops_size, f"losses.{name}.crops_size"
    told = f"crops.global_crops_size = {config.crops.global_crops_size}" if size is None else f"{key} = {size}"
    size = size or config.crops.global_crops_size
    if size % patch:
        near = " or ".join(str(side) for side in (size // patch * patch, (size // patch + 1) * patch) if side)
        raise ValueError(
            f"{told} is not a multiple of the {patch} px of the patches of losses.{name}.teacher; give {key} = {near}."
        )


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

    Those of frozen teachers are looked at, too.

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
    for _, key, weights, follows in frozen_teachers(config):
        _check_is_file(key, weights)
        try:
            if follows:
                _check_weights(backbone, weights)
        except ValueError as error:
            raise ValueError(f"{key} must be of the student's architecture: {error}") from error


def _check_weights(backbone: nn.Module, path: str, positions: bool = True) -> None:
    if path and not is_url(path) and is_here(path):
        state, _ = starting_state(backbone, read_checkpoint(path), positions)
        check_shapes(backbone, state, path)


def try_starting_weights(network: nn.ModuleDict, backbones: Mapping[str, nn.Module], config: Config) -> list[str]:
    """Open the weights that a configuration names and look whether they fit and are finite, in a sentence each.

    Networks, the student and frozen teachers' ``backbones`` by the names of their terms, are on the meta device: what
    loads them at the start of a run does all but keep the values. Weights elsewhere are asked for, not downloaded.
    Raises as `load_starting_weights`, `load_frozen_teacher` and `check_found`.
    """
    told = []
    if path := starting_weights(config):
        if needs_download(path):
            check_found(path)
            told.append(f"Weights: {path} is there; it is downloaded, opened and checked when the run starts.")
        else:
            loaded = _without_values(lambda: load_starting_weights(network, config))
            told.append(f"Weights: {path} holds {', '.join(loaded)}, of the right shapes and finite.")
    for name, key, weights, _ in frozen_teachers(config):
        if name not in backbones:
            continue
        _check_is_file(key, weights)
        if needs_download(weights):
            check_found(weights)
            told.append(f"{key}: {weights} is there; it is downloaded, opened and checked when the run starts.")
        else:
            _without_values(partial(load_frozen_teacher, backbones[name], key, weights))
            told.append(f"{key}: {weights} is of the right shapes and finite.")
    return told or ["Weights: none are named, so that training starts from random ones."]


def _without_values(load: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a meta parameter.*")  # which keeps no values, as is meant here
        return load()
