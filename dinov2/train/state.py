"""State of a run beside its tensors, and whether a run may go on from it."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dinov2.configs import Config, public_config, saved_config
from dinov2.utils.provenance import package_versions
from dinov2.utils.secrets import public

logger = logging.getLogger("dinov2")

# Keys whose change would make the saved weights, optimiser state or data order mean something else.
_FIXED_KEYS = (
    "student.arch", "student.options", "student.patch_size", "student.ffn_layer", "student.num_register_tokens",
    "student.qkv_bias", "student.proj_bias", "student.ffn_bias", "crops.global_crops_size",
    "dino.head_n_prototypes", "dino.head_bottleneck_dim", "dino.head_nlayers", "dino.head_hidden_dim",
    "ibot.separate_head", "ibot.head_n_prototypes", "ibot.head_bottleneck_dim", "ibot.head_nlayers",
    "ibot.head_hidden_dim", "optim.layerwise_decay", "optim.patch_embed_lr_mult", "train.unfreeze_last_n_blocks",
    "train.seed", "data.lanes", "data.block_rows", "train.OFFICIAL_EPOCH_LENGTH",
)  # fmt: skip


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0  # completed optimiser steps
    samples: int = 0  # consumed over all ranks; the next step starts at this global sample index


def describe_state(state: TrainState, stream: dict[str, Any], global_batch: int, config: Config) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    as_dict = public_config(config)
    return {
        **vars(state),
        "global_batch": global_batch,
        "stream": stream,
        "config": as_dict,
        "config_sha256": hashlib.sha256(json.dumps(as_dict, sort_keys=True).encode()).hexdigest(),
        "versions": package_versions(),
    }


def check_resumable(saved: dict[str, Any], config: Config) -> None:
    """Refuse to resume a checkpoint's JSON part under a configuration that it does not fit; log harmless changes.

    Raises ValueError if fixed keys changed; all are named with both values.
    """
    before = _flatten(public(saved_config(saved["config"])))
    now = _flatten(json.loads(json.dumps(public_config(config))))
    changed = [key for key in now if before.get(key) != now[key]]
    fixed = [f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in changed if key in _FIXED_KEYS]
    if fixed:
        raise ValueError(
            f"The run in this output folder cannot go on with a changed configuration ({'; '.join(fixed)}); restore "
            "these values, or start in another output folder."
        )
    for key in changed:
        logger.info("Resuming with %s = %r (was %r).", key, now[key], before.get(key))


def check_loss_modules(saved: dict[str, Any], terms: Iterable[str]) -> None:
    """Refuse with a `ValueError` to resume where other ``terms`` of the loss have a state than a checkpoint holds."""
    before, now = sorted(saved.get("loss_modules", ())), sorted(terms)
    if before != now:
        raise ValueError(
            "The run in this output folder cannot go on with other terms that have weights of their own: the "
            f"checkpoint holds {', '.join(before) or 'none'}, section losses now has {', '.join(now) or 'none'}; "
            "restore the section, or start in another output folder."
        )


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; fixed keys that hold a mapping stay whole, so that a name more or less is a change."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and prefix + key not in _FIXED_KEYS:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
