"""Checks of values and of combinations of values, before any model, data or GPU is touched."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from dinov2.configs.decode import keys_of
from dinov2.configs.fields import accepted, shortened
from dinov2.configs.older_keys import MODULES
from dinov2.configs.schema import Config
from dinov2.extensions import BUILT_IN_STEPS

_MOST_PATCHES = 1 << 16  # of one view
_MOST_WEIGHTS = 1 << 31  # of one layer of a head
_MOST_STEPS = 10**9


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault, one per line."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def validate(config: Config, world_size: int) -> None:
    """Refuse values out of range and combinations that cannot work.

    Args:
        config: the decoded configuration.
        world_size: number of training processes.

    Raises:
        ConfigError: listing every fault with the key, its value and what would be accepted.
    """
    out_of_range = {
        path: f"{path} = {shortened(value)} is out of range; expected {accepted(hint, key)}."
        for path, hint, key, value in keys_of(config)
        if not key.accepts(value)
    }
    if faults := [*out_of_range.values(), *combination_faults(config, world_size, out_of_range)]:
        raise ConfigError(faults)


def combination_faults(config: Config, world_size: int, faulty: Collection[str] = ()) -> list[str]:
    """What is wrong with values that are right by themselves.

    Args:
        config: the decoded configuration.
        world_size: number of training processes.
        faulty: keys whose values are not the user's; combinations with them are not judged.
    """
    checks = (_crop_faults(config), _mask_faults(config), _data_faults(config), _online_faults(config),
              _step_faults(config, world_size), _network_faults(config), _precision_faults(config))  # fmt: skip
    return [fault.sentence for check in checks for fault in check if not fault.touches(faulty)]


class _Fault(NamedTuple):
    """What is wrong with a combination, after the keys that it is made of."""

    keys: str
    sentence: str

    def touches(self, faulty: Collection[str]) -> bool:
        """Whether a key, a section around it or an entry of it is faulty."""
        return any(
            f"{key}.".startswith(f"{bad}.") or bad.startswith((f"{key}.", f"{key}["))
            for key in self.keys.split()
            for bad in faulty
        )


def _crop_faults(config: Config) -> Iterator[_Fault]:
    crops, patch = config.crops, config.student.patch_size
    for name in ("global_crops_size", "local_crops_size"):
        keys, size = f"crops.{name} student.patch_size", getattr(crops, name)
        below, patches = size // patch * patch, (size // patch) ** 2
        if size % patch:
            near = " or ".join(str(side) for side in (below, below + patch) if side)
            multiple = f"is not a multiple of student.patch_size = {patch}"
            yield _Fault(keys, f"crops.{name} = {size} {multiple}; {near} would be.")
        elif patches > _MOST_PATCHES:
            made = f"and student.patch_size = {patch} make {patches:,} patches per view"
            yield _Fault(keys, f"crops.{name} = {size} {made}; at most {_MOST_PATCHES:,} are accepted.")
    for name in ("global_crops_scale", "local_crops_scale"):
        key, (low, high) = f"crops.{name}", getattr(crops, name)
        if not 0 < low <= high <= 1:
            yield _Fault(key, f"{key} = [{low}, {high}] is not a range; expected 0 < min <= max <= 1.")
    key, (low, high) = "augmentation.blur_sigma_min_max", config.augmentation.blur_sigma_min_max
    if low > high:
        yield _Fault(key, f"{key} = [{low}, {high}] is not a range; expected 0 < min <= max.")
    for key in (f"augmentation.steps.{name}" for name in BUILT_IN_STEPS if name in config.augmentation.steps):
        yield _Fault(key, f"{key} is a built-in step, which keys of augmentation itself set; leave it out.")
    key, kernel = "augmentation.blur_kernel_size", config.augmentation.blur_kernel_size
    if kernel % 2 == 0:
        yield _Fault(key, f"{key} = {kernel} is not an odd number of 1 or more.")
    smallest = min(crops.global_crops_size, crops.local_crops_size)
    if kernel // 2 >= smallest:
        wide = f"is too wide for views of {smallest} px; expected below {2 * smallest}."
        yield _Fault(f"{key} crops.global_crops_size crops.local_crops_size", f"{key} = {kernel} {wide}")


def _mask_faults(config: Config) -> Iterator[_Fault]:
    ratio, probability = "ibot.mask_ratio_min_max", "ibot.mask_sample_probability"
    (low, high), masked = config.ibot.mask_ratio_min_max, config.ibot.mask_sample_probability
    if low > high:
        yield _Fault(ratio, f"{ratio} = [{low}, {high}] is not a range in [0, 1] with min <= max.")
    if masked * 4 % 1:
        yield _Fault(
            probability,
            f"{probability} = {masked} is not a multiple of 0.25; masks are stratified over the four global crops "
            "of two images, so 0, 0.25, 0.5, 0.75 or 1 are accepted.",
        )
    side = config.crops.global_crops_size // config.student.patch_size
    if config.ibot.loss_weight > 0 and (masked == 0 or side < 2 or side * side * high < 1):
        yield _Fault(
            f"{ratio} {probability} ibot.loss_weight crops.global_crops_size student.patch_size",
            f"ibot.loss_weight = {config.ibot.loss_weight} needs masked patches, but {probability} = {masked} and "
            f"{ratio} = [{low}, {high}] mask none of {side} x {side} patches; set the weight to 0 or raise the two.",
        )


def _data_faults(config: Config) -> Iterator[_Fault]:
    data, keys = config.data, "data.path data.datasets"
    expected = "a folder, a file, a hub dataset or a URL"
    if not data.path and not data.datasets:
        yield _Fault(keys, f"data.path is empty; give {expected}, or several in data.datasets.")
    if data.path and data.datasets:
        yield _Fault(keys, f"data.path = {shortened(data.path)} and data.datasets name different data; use one.")
    if data.revision and data.datasets:
        yield _Fault(
            "data.revision data.datasets",
            f"data.revision = {shortened(data.revision)} does not reach data.datasets; give each entry its own.",
        )
    for number, dataset in enumerate(data.datasets):
        if not dataset.path:
            key = f"data.datasets[{number}]"
            yield _Fault(key, f"{key}.path is empty; give {expected}.")


def _online_faults(config: Config) -> Iterator[_Fault]:
    online = config.online
    key = "online.magnifications" if online.magnifications else "online.mpp"
    wanted = online.magnifications or online.mpp
    if not wanted or len(set(wanted)) < len(wanted):
        yield _Fault(key, f"{key} = {shortened(list(wanted))} is not a list of different numbers above 0.")
    if online.mpp_weights and len(online.mpp_weights) != len(wanted):
        yield _Fault(
            f"{key} online.mpp_weights",
            f"online.mpp_weights = {shortened(list(online.mpp_weights))} does not give each of {key} = "
            f"{shortened(list(wanted))} a number above 0.",
        )


def _step_faults(config: Config, world_size: int) -> Iterator[_Fault]:
    batch, optim, epoch = config.train.batch_size_per_gpu, config.optim, config.train.OFFICIAL_EPOCH_LENGTH
    if batch != "auto" and batch % 2:
        pairs = "masks are stratified over pairs of images, so it is even."
        yield _Fault("train.batch_size_per_gpu", f"train.batch_size_per_gpu = {batch} is odd; {pairs}")
    if optim.early_stop is not None and optim.early_stop > optim.epochs:
        until = f"is not in (0, optim.epochs = {optim.epochs}]; null means epochs."
        yield _Fault("optim.early_stop optim.epochs", f"optim.early_stop = {optim.early_stop} {until}")
    if optim.warmup_epochs > optim.epochs:
        exceeds = f"exceeds optim.epochs = {optim.epochs}."
        yield _Fault("optim.warmup_epochs optim.epochs", f"optim.warmup_epochs = {optim.warmup_epochs} {exceeds}")
    steps = (optim.epochs if optim.early_stop is None else optim.early_stop) * epoch
    images = optim.epochs * epoch * (2 if batch == "auto" else batch) * world_size
    if round(steps) == 0 or optim.epochs * epoch > _MOST_STEPS or images >= 2**62:
        yield _Fault(
            "optim.epochs optim.early_stop train.OFFICIAL_EPOCH_LENGTH",
            f"optim.epochs = {optim.epochs}, optim.early_stop = {optim.early_stop} and train.OFFICIAL_EPOCH_LENGTH = "
            f"{epoch} make {steps:g} steps; at least one is expected, and {_MOST_STEPS:,} at most.",
        )
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0 and not config.losses:
        yield _Fault(
            "dino.loss_weight ibot.loss_weight losses",
            "dino.loss_weight = 0 and ibot.loss_weight = 0 leave nothing to learn; set one above 0.",
        )
    for number, labelled in enumerate(config.evaluation.labelled):
        if not labelled.path:
            key = f"evaluation.labelled[{number}]"
            yield _Fault(key, f"{key}.path is empty; give a folder of labelled tiles.")


def _network_faults(config: Config) -> Iterator[_Fault]:
    for section in ("dino", "ibot"):
        head = getattr(config, section)
        for one, other in (("n_prototypes", "bottleneck_dim"), ("hidden_dim", "bottleneck_dim")):
            sides = {f"{section}.head_{name}": getattr(head, f"head_{name}") for name in (one, other)}
            weights = math.prod(sides.values())
            if weights > _MOST_WEIGHTS:
                named = " and ".join(f"{key} = {value}" for key, value in sides.items())
                many = f"make a layer of {weights:,} weights; at most {_MOST_WEIGHTS:,} are accepted."
                yield _Fault(" ".join(sides), f"{named} {many}")
    weights = {
        "MODEL.WEIGHTS": config.MODEL.WEIGHTS,
        "student.pretrained_weights": config.student.pretrained_weights,
        "train.use_pretrained": config.train.use_pretrained,
    }
    named = [f"{key} = {value}" for key, value in weights.items() if value]
    if len(named) > 1:
        yield _Fault(" ".join(weights), f"{' and '.join(named)} name different starting weights; use one.")


def _precision_faults(config: Config) -> Iterator[_Fault]:
    precision, keys = config.compute_precision, "compute_precision precision"
    of = {(network, module): getattr(getattr(precision, network), module) for network, module in MODULES}
    in_fp16 = [m for (n, m), one in of.items() if n == "student" and one.mixed_precision.param_dtype == "fp16"]
    if in_fp16 and not precision.grad_scaler:
        yield _Fault(
            keys,
            f"compute_precision.grad_scaler = false while student.{in_fp16[0]} computes in fp16, where gradients "
            "underflow without a scaler; set it to true or use bf16.",
        )
    fp8 = config.performance.fp8
    for network in {"none": (), "teacher": ("teacher",), "all": ("student", "teacher")}[fp8]:
        dtype = of[network, "backbone"].mixed_precision.param_dtype
        if dtype != "bf16":
            key = f"compute_precision.{network}.backbone.mixed_precision.param_dtype"
            yield _Fault(
                f"{keys} performance.fp8",
                f"performance.fp8 = {fp8} goes with bf16, while {key} = {dtype}; set bf16 there, or "
                "performance.fp8 = none.",
            )
    for module in ("backbone", "dino_head", "ibot_head"):
        ours, theirs = of["student", module].sharding_strategy, of["teacher", module].sharding_strategy
        if ours != theirs and {ours, theirs} != {"SHARD_GRAD_OP", "FULL_SHARD"}:
            yield _Fault(
                keys,
                f"compute_precision.student.{module}.sharding_strategy = {ours} and teacher's = {theirs} place the "
                f"weights differently, but the teacher follows the student shard by shard; set {ours} for both.",
            )
