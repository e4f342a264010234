"""Keys of Meta's, OpenMidnight's and older Path-FM files, and what has taken their place."""

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from dinov2.configs.fields import shortened

MODULES = tuple((n, m) for n in ("teacher", "student") for m in ("backbone", "dino_head", "ibot_head"))


class OlderKey(NamedTuple):
    """Successor of a key."""

    new: str = ""  # key that has taken its place
    ignored: str = ""  # why it decides nothing, where it is accepted without effect
    usual: tuple[str, ...] = ()  # values of a key without effect that our own files state; they bring no notice
    only: tuple[str, ...] = ()  # of a key without effect the values that are still accepted; empty accepts any


_NOW_DEBUG = (
    "packed_crops", "inverse_gather", "factored_targets", "prune_last_block", "weight_copies", "compile_backend",
)  # fmt: skip
OLDER_KEYS = {
    # Of these five, the two switches choose which path is the data; see `OlderKeys._choose_data`.
    "train.streaming_from_hf": OlderKey("data.kind"),
    "train.online_patching": OlderKey("data.kind"),
    "train.streaming_dataset_path": OlderKey("data.path"),
    "train.sample_list_path": OlderKey("data.path"),
    "online.slides": OlderKey("data.path"),
    "train.streaming_dataset_revision": OlderKey("data.revision"),
    "train.datasets": OlderKey("data.datasets"),
    "train.exclusion_file": OlderKey("data.exclusion_file"),
    "train.validation_share": OlderKey("data.validation_fraction"),
    "train.tile_size": OlderKey("data.tile_size"),
    # OpenMidnight's files of high-resolution post-training.
    "train.patch_size_pixels": OlderKey("data.tile_size"),
    "train.teacher_checkpoint_path": OlderKey("MODEL.WEIGHTS"),
    "train.pretrained_weights": OlderKey("student.pretrained_weights"),  # of which it takes the backbone alone
    "train.gradient_accumulation_steps": OlderKey("optim.accumulation_steps"),
    "train.slide_mpp_file": OlderKey("data.mpp_file"),
    "train.slide_root": OlderKey("data.slide_root"),
    "train.sample_list_columns": OlderKey("data.sample_list_columns"),
    "train.stream_lanes": OlderKey("data.lanes"),
    "train.stream_block_rows": OlderKey("data.block_rows"),
    "train.stream_memory_gib": OlderKey("data.memory_gib"),
    "train.stream_attempts": OlderKey(ignored="data.outage_minutes decides how long a server is asked again"),
    "data.retries": OlderKey(ignored="data.outage_minutes decides how long a server is asked again"),
    "train.max_damaged_share": OlderKey("data.max_corrupt_fraction"),
    "online.slide_share": OlderKey("data.slide_fraction"),
    "online.slide_fraction": OlderKey("data.slide_fraction"),
    "online.max_patches": OlderKey("data.max_tiles"),
    **{f"performance.{name}": OlderKey(f"debug.{name}") for name in _NOW_DEBUG},
    "dino.do_kde": OlderKey(ignored="dino.kde_loss_weight > 0 decides"),
    "dino.do_koleo": OlderKey(ignored="dino.koleo_loss_weight > 0 decides"),
    "train.saveckp_freq": OlderKey(ignored="train.checkpoint_period_iterations decides"),
    "train.cache_dataset": OlderKey(ignored="the index of shards is always kept in the run's folder"),
    "train.dataset_path": OlderKey(ignored="data.path names the data"),
    "train.augmentation_device": OlderKey(ignored="the decode workers render the views", only=("cpu",)),
    "augmentation.backend": OlderKey(ignored="there is one backend", only=("fast",)),
    "optim.lr": OlderKey(ignored="the learning rate is optim.base_lr under optim.scaling_rule"),
    "student.block_chunks": OlderKey(ignored="blocks are never chunked; weights saved in chunks still load"),
    "gram.loss_weight": OlderKey("losses.gram.weight"),
    "gram.*": OlderKey("losses.gram.*"),
    "distillation.*": OlderKey("losses.distillation.*"),
    "compute_precision.*.*.mixed_precision.buffer_dtype": OlderKey(ignored="the networks have no buffers"),
    "compute_precision.teacher.*.mixed_precision.reduce_dtype": OlderKey(
        ignored="the teacher has no gradients to reduce", usual=("fp32",)
    ),
}
"""Every older key; ``*`` stands for any part of a path, at the end of a successor for the same."""

_SWITCHES = ("train.streaming_from_hf", "train.online_patching")


class OlderKeys:
    """Translates the layers of a configuration, in the order in which they are merged."""

    def __init__(self) -> None:
        self.faults: list[str] = []  # a sentence per key that cannot be translated
        self.notices: list[str] = []  # a sentence per key that was given and has no effect
        self.spelled: dict[str, str] = {}  # the spelling of each key that was given by an older one
        self._data: dict[str, Any] = {}  # switches and paths of all layers so far
        self._chosen = False  # whether data.path and data.kind come from them

    def translate(self, layer: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a nested mapping in today's keys, in which ``precision`` is written out for every module."""
        layer, given = merge({}, layer), {}  # of YAML's aliases several are one mapping
        data = layer.get("data")
        for new in [new for new in self.spelled if any(_matches(layer, new.split(".")))]:
            del self.spelled[new]
        names_data = isinstance(data, dict) and ("path" in data or "datasets" in data)
        for pattern, entry in OLDER_KEYS.items():
            for old, parent, name in list(_matches(layer, pattern.split("."))):
                value, new = parent.pop(name), entry.new.replace("*", name)
                if entry.only and value not in entry.only:
                    only = " or ".join(entry.only)
                    given_as = f"{old} = {shortened(value)} is not available"
                    self.faults.append(f"{given_as}: {entry.ignored}; {only} is accepted.")
                elif entry.ignored:
                    notice = f"Config key {old} has no effect: {entry.ignored}."
                    self.notices += [] if value in entry.usual else [notice]
                elif entry.new in ("data.kind", "data.path"):
                    given[old] = value
                elif not _put(layer, new, value):
                    self.faults.append(f"{old} and {new} are the same key; give one of the two.")
                else:
                    self.spelled[new] = old
        if given:
            self._choose_data(layer, given)
        elif names_data and self._chosen:
            _put(layer, "data.kind", "auto")
            self._chosen = False
        _drop_empty(layer, "gram", "distillation")
        self._rename_arch(layer.get("student"))
        if layer.get("precision") in ("bf16", "fp16", "fp32"):
            for network, module in MODULES:
                key = f"compute_precision.{network}.{module}.mixed_precision.param_dtype"
                _put(layer, key, layer["precision"])
        return layer

    def _rename_arch(self, student: Any) -> None:
        arch = student.get("arch") if isinstance(student, dict) else None
        if isinstance(arch, str) and (named := re.fullmatch(r"(vit_\w+)_memeff", arch)):
            student["arch"] = named[1]
            self.notices.append(
                f"student.arch = {arch} is {student['arch']}: attention always spares memory, and "
                "student.attention_backend picks its kernel."
            )

    def _choose_data(self, layer: dict[str, Any], given: dict[str, Any]) -> None:
        """Set data.kind and data.path as the switches say, from the older keys of this layer and those before."""
        for switch in _SWITCHES:
            if not isinstance(given.get(switch, True), bool):
                value = given.pop(switch)
                self.faults.append(f"{switch} = {shortened(value)} is not valid; expected true or false.")
        self._data |= given
        if self._data.get("train.online_patching", False):
            kind, old = "slides", "online.slides"
        elif self._data.get("train.streaming_from_hf", True):
            kind, old = "parquet", "train.streaming_dataset_path"
        else:
            kind, old = "sample_list", "train.sample_list_path"
        if not given.keys() & {*_SWITCHES, old}:
            return
        if old in self._data or self._chosen:  # the path of another kind is not this one's
            if old in given and not _put(layer, "data.path", given[old]):
                self.faults.append(f"{old} and data.path are the same key; give one of the two.")
            _put(layer, "data.path", self._data.get(old, ""))
        _put(layer, "data.kind", kind)
        self.spelled["data.path"], self._chosen = old, True


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, the upper one's counts, and its mappings are copied."""
    merged = dict(lower)
    for name, value in upper.items():
        if isinstance(value, Mapping):
            below = merged.get(name)
            value = merge(below if isinstance(below, Mapping) else {}, value)
        merged[name] = value
    return merged


def _matches(layer: Any, pattern: Sequence[str], path: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Paths that fit a pattern, each with the mapping that holds its last name."""
    if not isinstance(layer, dict):
        return
    for name in layer if pattern[0] == "*" else pattern[:1]:
        here = f"{path}.{name}" if path else name
        if name in layer and len(pattern) == 1:
            yield here, layer, name
        elif name in layer:
            yield from _matches(layer[name], pattern[1:], here)


def _drop_empty(layer: dict[str, Any], *sections: str) -> None:
    """Drop sections all of whose keys have gone elsewhere."""
    for section in sections:
        if not layer.get(section, True):
            del layer[section]


def _put(layer: MutableMapping[str, Any], path: str, value: Any) -> bool:
    """Set a nested key, unless it or a section above it has a value; returns whether it was set."""
    *sections, name = path.split(".")
    for section in sections:
        if layer.get(section) is None:
            layer[section] = {}
        layer = layer[section]
        if not isinstance(layer, dict):
            return False
    if name in layer:
        return False
    layer[name] = value
    return True
