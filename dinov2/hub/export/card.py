"""The model card of an export: what it is, how to load it, on what and how it was trained, what it is worth."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from torch import nn

from dinov2.configs import Config, saved_config
from dinov2.hub.export.layout import Layout
from dinov2.hub.layouts_dinov3 import is_dinov3

CARD = "README.md"
"""Its name in an export, and on the Hugging Face hub."""

LIBRARY = "path-fm"
"""What the hub calls this package."""

_TEMPLATE = Path(__file__).with_name("card.md")
# Sections that say what a run learnt; of the others these keys do.
_RECIPE = ("student", "teacher", "dino", "ibot", "losses", "crops", "augmentation", "optim", "precision")
_OF_TRAIN = ("batch_size_per_gpu", "seed", "OFFICIAL_EPOCH_LENGTH", "centering", "unfreeze_last_n_blocks")
_STARTS = {"MODEL": ("WEIGHTS",), "student": ("pretrained_weights",)}


def model_card(
    layout: Layout | None,
    model: nn.Module,
    dtype: str,
    side: int | None,
    colours: str,
    record: Mapping[str, Any],
    results: str = "",
    license_id: str = "",
    repo: str = "",
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        layout: of the export; None for a teacher as runs write it.
        model, dtype: its backbone and the name of its floating-point type.
        side: of the images in px, where it is known.
        colours: mean and deviation that images are normalised with, and where these are from, in words.
        record: the JSON beside the teacher, or nothing.
        results: a table of probe results.
        license_id: the hub's name of a licence; left out of the front matter where it is empty.
        repo: ``org/name`` on the hub; a placeholder stands where it is empty.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = _config_of(record)
    family = "dinov3" if is_dinov3(model) else "dinov2"
    data = ModelCardData(
        license=license_id or None,
        library_name=layout.card_library if layout else LIBRARY,
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "histology", "self-supervised", "vision-transformer", family],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=repo.partition("/")[2] or "Backbone for histology",
        trained=bool(config),
        facts=_facts(model, dtype, side, colours, record),
        width=model.embed_dim,
        loading=layout.loading(repo or "ORG/NAME") if layout else "",
        opens_here=layout.opens_here if layout else True,
        repo=(repo or "ORG/NAME") if layout else "",
        data=_data(config, record),
        recipe=yaml.safe_dump(_recipe(config), sort_keys=False).strip() if config else "",
        results=results,
        license=license_id,
    )
    return str(card)


def _config_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the run in today's keys; empty where there is none, or none that this version knows."""
    config = record.get("config")
    try:
        return saved_config(config) if config and "step" in record else {}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _facts(
    model: nn.Module, dtype: str, side: int | None, colours: str, record: Mapping[str, Any]
) -> list[tuple[str, str]]:
    architecture = record.get("architecture", {}).get("arch") or type(model).__name__
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    patch, registers = model.patch_size, getattr(model, "num_prefix_tokens", 1) - 1
    blocks = f", {len(model.blocks)} blocks" if hasattr(model, "blocks") else ""
    return [
        ("Architecture", f"{architecture}{blocks} of width {model.embed_dim}"),
        ("Parameters", f"{millions:.1f} million, {dtype}"),
        ("Tokens", f"class token, {registers} registers, one of each patch of {patch} px"),
        *([("Images", f"{side} px")] if side else []),
        ("Normalisation", colours),
    ]


def _data(config: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Names of datasets, without where they lie on a machine, and how many tiles of them were seen."""
    section = config.get("data", {})
    entries = section.get("datasets") or ([section] if section.get("path") else [])
    whole = sum(entry.get("weight", 1) for entry in entries)
    lines = [
        f"`{_public_place(entry['path'])}`"
        + (f", {entry.get('weight', 1) / whole:.0%} of the samples" if len(entries) > 1 else "")
        + (f", revision {entry['revision']}" if entry.get("revision") else "")
        for entry in entries
    ]
    steps, samples = record.get("step"), record.get("samples")
    if steps and samples:
        lines.append(f"{samples:,} tiles seen in {steps:,} steps, {samples // steps:,} in each")
    return lines


def _public_place(path: str) -> str:
    """Of a local file or folder its name; URLs, ids and relative paths as they are."""
    is_local = path.startswith(("/", "~")) and "://" not in path
    return PurePosixPath(path).name if is_local else path


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that differ from the defaults, of what makes a run what it is."""
    defaults = json.loads(json.dumps(asdict(Config())))
    chosen = {name: config[name] for name in _RECIPE if name in config}
    chosen["train"] = {name: config["train"][name] for name in _OF_TRAIN}
    for section, names in _STARTS.items():  # weights are named as data are
        values = {name: _public_place(config[section][name]) for name in names if config[section].get(name)}
        chosen[section] = {**chosen.get(section, {}), **values}
    return _differing(chosen, defaults)


def _differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if below := _differing(value, default):
                found[name] = below
        elif value != default:
            found[name] = value
    return found
