"""State of a run beside its tensors, and whether a run may go on from it."""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.configs import Config, public_config, saved_config
from dinov2.configs.decode import Decoder
from dinov2.configs.fields import key
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

# Keys that say how and how long a run is computed, watched and stored, or where its data are, not what it is: a changed
# dataset is found by its fingerprint.
_FREE_KEYS = re.compile(
    r"(logging|evaluation|performance|debug|compute_precision)\..*|precision|MODEL\.WEIGHTS|optim\.early_stop"
    r"|losses\.gram\.ckpt|online\.cache_dir|student\.(attention_backend|pretrained_weights)"
    r"|data\.(path|kind|revision|datasets|outage_minutes|memory_gib|max_corrupt_fraction|slide_root)"
    r"|train\.(allow_changes|on_collapse|async_checkpoints|batch_size_per_gpu|checkpoint_period_iterations"
    r"|keep_checkpoints(_every)?"
    r"|num_workers|hang_timeout|start_timeout|output_dir|prefetch_factor|skip_checkpointer|time_limit|use_pretrained)"
)


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0  # completed optimiser steps
    samples: int = 0  # consumed over all ranks; the next step starts at this global sample index


@dataclass(frozen=True)
class SavedStream:
    """Parameters of the order of samples, see `TrainLoader.stream_state`."""

    seed: int = key(dataclasses.MISSING, "of the order", least=0, most=2**64 - 1)
    lanes: int = key(dataclasses.MISSING, "read streams", least=1)
    block_rows: int = key(dataclasses.MISSING, "rows of a shuffle block", least=1)
    global_batch: int = key(dataclasses.MISSING, "images per step over all ranks", least=1)
    fingerprint: str = key(dataclasses.MISSING, "of the dataset")
    dataset_lanes: tuple[int, ...] = key((), "read streams of each dataset of a mixture", least=0)


@dataclass(frozen=True)
class SavedScaler:
    """State of the loss scaler; of one that is off there is none."""

    scale: float = key(1.0, "factor of the loss", above=0)
    growth_factor: float = key(2.0, "by which it grows", above=0)
    backoff_factor: float = key(0.5, "by which it falls", above=0)
    growth_interval: int = key(1, "good steps before it grows", least=1)
    _growth_tracker: int = key(0, "good steps since", least=0)


@dataclass(frozen=True)
class SavedState:
    """The JSON part of a checkpoint."""

    step: int = key(dataclasses.MISSING, "completed optimiser steps", least=0)
    samples: int = key(dataclasses.MISSING, "consumed over all ranks", least=0)
    global_batch: int = key(dataclasses.MISSING, "images per step over all ranks", least=1)
    config: Mapping[str, Any] = key(dataclasses.MISSING, "configuration of the launch that saved")
    config_sha256: str = key(dataclasses.MISSING, "of the configuration")
    stream: SavedStream = key(dataclasses.MISSING, "order of samples")
    scaler: SavedScaler = key(dataclasses.MISSING, "loss scaler")
    versions: Mapping[str, Any] = key({}, "what the run was made with")
    places: tuple[str, ...] = key((), "locations of the datasets")
    loss_modules: tuple[str, ...] = key((), "terms of the loss that have a state")
    checksums: str = key("", "file of checksums; of an earlier version there is none")


def decode_state(written: Any) -> dict[str, Any]:
    """The JSON part of a checkpoint as it was written; raises ValueError, which names all faults, if it is none."""
    decoder = Decoder({})
    if not isinstance(written, Mapping):
        raise ValueError(f"{written!r:.80} is not a state; a mapping is expected")
    state = decoder.section(SavedState, written)
    if decoder.faults:
        raise ValueError("; ".join(fault.rstrip(".") for fault in decoder.faults))
    if state.samples != state.step * state.global_batch:
        raise ValueError(
            f"samples = {state.samples} is not valid; expected {state.step * state.global_batch}, the product of "
            f"step = {state.step} and global_batch = {state.global_batch}"
        )
    if state.stream.global_batch != state.global_batch:
        raise ValueError(
            f"stream.global_batch = {state.stream.global_batch} is not valid; expected global_batch = "
            f"{state.global_batch}"
        )
    if state.config_sha256 != (found := _sha256(written["config"])):
        raise ValueError(f"config_sha256 = {state.config_sha256!r} is not that of config; expected {found!r}")
    return {"scaler": {}, **written}


def describe_state(state: TrainState, stream: dict[str, Any], global_batch: int, config: Config) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    as_dict = public_config(config)
    return {
        **vars(state),
        "global_batch": global_batch,
        "stream": stream,
        "config": as_dict,
        "config_sha256": _sha256(as_dict),
        "versions": package_versions(),
    }


def changes(saved: Mapping[str, Any], config: Config) -> dict[str, str]:
    """Differences of a configuration from one that some version saved: by key, both values in words."""
    before = _flatten(public(saved_config(saved)))
    now = _flatten(json.loads(json.dumps(public_config(config))))
    # Of an earlier version there may be keys that are gone; those that users name themselves they have left out.
    left_out = [name for name in before if name not in now and name.startswith(_OPEN)]
    return {
        name: f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in (*now, *left_out)
        if name in left_out or before.get(name) != now[name]
    }


def check_resumable(saved: dict[str, Any], config: Config) -> None:
    """Refuse to resume a checkpoint's JSON part under a configuration that it does not fit; log harmless changes.

    Raises ValueError if fixed keys changed, or others that make it another run and ``train.allow_changes`` is false;
    all are named with both values.
    """
    told = changes(saved["config"], config)
    if fixed := [told[name] for name in told if name in _FIXED_KEYS]:
        raise ValueError(
            f"The run in this output folder cannot go on with a changed configuration ({'; '.join(fixed)}); restore "
            "these values, or start in another output folder."
        )
    others = [told[name] for name in told if not _FREE_KEYS.fullmatch(name)]
    if others and not config.train.allow_changes:
        raise ValueError(
            f"The run in this output folder was begun with other values ({'; '.join(others)}), so that it would become "
            "two runs in one; restore them, start in another output folder, or add train.allow_changes=true."
        )
    for name, change in told.items():
        if name == "train.batch_size_per_gpu":
            logger.info("%s has no effect: the run keeps its batch of %d images.", name, saved["global_batch"])
        elif name != "train.allow_changes":
            logger.info("Resuming; %s.", change)


def check_loss_modules(saved: dict[str, Any], terms: Iterable[str]) -> None:
    """Refuse with a `ValueError` to resume where other ``terms`` of the loss have a state than a checkpoint holds."""
    before, now = sorted(saved.get("loss_modules", ())), sorted(terms)
    if before != now:
        raise ValueError(
            "The run in this output folder cannot go on with other terms that have weights of their own: the "
            f"checkpoint holds {', '.join(before) or 'none'}, section losses now has {', '.join(now) or 'none'}; "
            "restore the section, or start in another output folder."
        )


def _sha256(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _open_sections(section: Any, prefix: str = "") -> Iterator[str]:
    """Beginnings of the dotted keys, within a section, whose names users choose."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _open_sections(value, f"{prefix}{field.name}.")
        elif isinstance(value, Mapping):
            yield f"{prefix}{field.name}."


_OPEN = tuple(_open_sections(Config()))


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; fixed keys that hold a mapping stay whole, so that a name more or less is a change."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        is_part = isinstance(value, dict) and (value or not prefix.startswith(_OPEN))  # one without options is a value
        if is_part and prefix + name not in _FIXED_KEYS:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
