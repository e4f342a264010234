"""Checks of values and of combinations of values, before any model, data or GPU is touched."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from dinov2.configs.decode import keys_of
from dinov2.configs.fields import accepted, shortened
from dinov2.configs.older_keys import MODULES
from dinov2.configs.schema import Config

_MOST_PATCHES = 1 << 16  # of one view
_MOST_WEIGHTS = 1 << 31  # of one layer of a head
_MOST_STEPS = 10**9

Fault = tuple[Sequence[str], str]
"""The keys that a combination of values is made of, and what is wrong with it."""


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
              _training_faults(config, world_size), _precision_faults(config))  # fmt: skip
    return [sentence for check in checks for keys, sentence in check if not _touches(keys, faulty)]


def _touches(keys: Sequence[str], faulty: Collection[str]) -> bool:
    """Whether a key, a section around it or a part of it is faulty."""
    return any(
        f"{key}.".startswith(f"{bad}.") or bad.startswith((f"{key}.", f"{key}["))
        for key in keys
        for bad in faulty
    )


def _crop_faults(config: Config) -> Iterator[Fault]:
    crops, patch = config.crops, config.student.patch_size
    for name in ("global_crops_size", "local_crops_size"):
        keys, size = (f"crops.{name}", "student.patch_size"), getattr(crops, name)
        below = size // patch * patch
        if size % patch:
            near = " or ".join(str(side) for side in (below, below + patch) if side)
            yield (
                keys,
                f"crops.{name} = {size} is not a multiple of student.patch_size = {patch}; {near} would be.",
            )
        elif (size // patch) ** 2 > _MOST_PATCHES:
            yield (
                keys,
                (
                    f"crops.{name} = {size} and student.patch_size = {patch} make {(size // patch) ** 2:,} patches per "
                    f"view; at most {_MOST_PATCHES:,} are accepted."
                ),
            )
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(crops, name)
        if not 0 < low <= high <= 1:
            yield (
                (f"crops.{name}",),
                f"crops.{name} = [{low}, {high}] is not a range; expected 0 < min <= max <= 1.",
            )
    low, high = config.augmentation.blur_sigma_min_max
    if low > high:
        key = "augmentation.blur_sigma_min_max"
        yield (key,), f"{key} = [{low}, {high}] is not a range; expected 0 < min <= max."
    key, kernel = "augmentation.blur_kernel_size", config.augmentation.blur_kernel_size
    if kernel % 2 == 0:
        yield (key,), f"{key} = {kernel} is not an odd number of 1 or more."
    smallest = min(crops.global_crops_size, crops.local_crops_size)
    if kernel // 2 >= smallest:
        yield (
            (key, "crops.global_crops_size", "crops.local_crops_size"),
            (f"{key} = {kernel} is too wide for views of {smallest} px; expected below {2 * smallest}."),
        )


def _mask_faults(config: Config) -> Iterator[Fault]:
    ratio, probability = "ibot.mask_ratio_min_max", "ibot.mask_sample_probability"
    (low, high), share = config.ibot.mask_ratio_min_max, config.ibot.mask_sample_probability
    if low > high:
        yield (ratio,), f"{ratio} = [{low}, {high}] is not a range in [0, 1] with min <= max."
    if share * 4 % 1:
        yield (
            (probability,),
            (
                f"{probability} = {share} is not a multiple of 0.25; masks are stratified over the four global crops of "
                "two images, so 0, 0.25, 0.5, 0.75 or 1 are accepted."
            ),
        )
    side = config.crops.global_crops_size // config.student.patch_size
    if config.ibot.loss_weight > 0 and (share == 0 or side < 2 or side * side * high < 1):
        keys = (ratio, probability, "ibot.loss_weight", "crops.global_crops_size", "student.patch_size")
        yield (
            keys,
            (
                f"ibot.loss_weight = {config.ibot.loss_weight} needs masked patches, but {probability} = {share} and "
                f"{ratio} = [{low}, {high}] mask none of {side} x {side} patches; set the weight to 0 or raise the two."
            ),
        )


def _data_faults(config: Config) -> Iterator[Fault]:
    data = config.data
    if not data.path and not data.datasets:
        yield (
            ("data.path", "data.datasets"),
            (
                "data.path is empty; give a folder, a file, a hub dataset or a URL, or several in data.datasets."
            ),
        )
    if data.path and data.datasets:
        yield (
            ("data.path", "data.datasets"),
            (f"data.path = {shortened(data.path)} and data.datasets name different data; use one."),
        )
    if data.revision and data.datasets:
        yield (
            ("data.revision", "data.datasets"),
            (
                f"data.revision = {shortened(data.revision)} does not reach data.datasets; give each entry its own revision."
            ),
        )
    for number, dataset in enumerate(data.datasets):
        if not dataset.path:
            key = f"data.datasets[{number}].path"
            yield (key, "data.datasets"), f"{key} is empty; give a folder, a file, a hub dataset or a URL."


def _online_faults(config: Config) -> Iterator[Fault]:
    online = config.online
    key = "online.magnifications" if online.magnifications else "online.mpp"
    wanted = online.magnifications or online.mpp
    if not wanted or len(set(wanted)) < len(wanted):
        yield (key,), f"{key} = {shortened(list(wanted))} is not a list of different numbers above 0."
    if online.mpp_weights and len(online.mpp_weights) != len(wanted):
        yield (
            (key, "online.mpp_weights"),
            (
                f"online.mpp_weights = {shortened(list(online.mpp_weights))} does not give each of {key} = "
                f"{shortened(list(wanted))} a number above 0."
            ),
        )


def _training_faults(config: Config, world_size: int) -> Iterator[Fault]:
    batch, optim, epoch = config.train.batch_size_per_gpu, config.optim, config.train.OFFICIAL_EPOCH_LENGTH
    if batch != "auto" and batch % 2:
        yield (
            ("train.batch_size_per_gpu",),
            (
                f"train.batch_size_per_gpu = {batch} is odd; masks are stratified over pairs of images, so it is even."
            ),
        )
    if optim.early_stop is not None and optim.early_stop > optim.epochs:
        yield (
            ("optim.early_stop", "optim.epochs"),
            (
                f"optim.early_stop = {optim.early_stop} is not in (0, optim.epochs = {optim.epochs}]; null means epochs."
            ),
        )
    if optim.warmup_epochs > optim.epochs:
        yield (
            ("optim.warmup_epochs", "optim.epochs"),
            (f"optim.warmup_epochs = {optim.warmup_epochs} exceeds optim.epochs = {optim.epochs}."),
        )
    last = optim.epochs if optim.early_stop is None else optim.early_stop
    steps = last * epoch
    images = optim.epochs * epoch * (2 if batch == "auto" else batch) * world_size
    if round(steps) == 0 or optim.epochs * epoch > _MOST_STEPS or images >= 2**62:
        yield (
            ("optim.epochs", "optim.early_stop", "train.OFFICIAL_EPOCH_LENGTH"),
            (
                f"optim.epochs = {optim.epochs}, optim.early_stop = {optim.early_stop} and train.OFFICIAL_EPOCH_LENGTH = "
                f"{epoch} make {steps:g} steps; from 1 to {_MOST_STEPS:,} are accepted."
            ),
        )
    for section in ("dino", "ibot"):
        head = getattr(config, section)
        widest = max(head.head_n_prototypes * head.head_bottleneck_dim, head.head_hidden_dim**2)
        if widest > _MOST_WEIGHTS:
            yield (
                (f"{section}.head_n_prototypes", f"{section}.head_bottleneck_dim"),
                (
                    f"{section}.head_n_prototypes = {head.head_n_prototypes} and {section}.head_bottleneck_dim = "
                    f"{head.head_bottleneck_dim} make a layer of {widest:,} weights; at most {_MOST_WEIGHTS:,} are accepted."
                ),
            )
    for number, labelled in enumerate(config.evaluation.labelled):
        if not labelled.path:
            key = f"evaluation.labelled[{number}].path"
            yield (key, "evaluation.labelled"), f"{key} is empty; give a folder of labelled tiles."
    weights = {
        "MODEL.WEIGHTS": config.MODEL.WEIGHTS,
        "student.pretrained_weights": config.student.pretrained_weights,
        "train.use_pretrained": config.train.use_pretrained,
    }
    named = [f"{key} = {value}" for key, value in weights.items() if value]
    if len(named) > 1:
        yield tuple(weights), f"{' and '.join(named)} name different starting weights; use one."
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0 and not config.losses:
        yield (
            ("dino.loss_weight", "ibot.loss_weight", "losses"),
            ("dino.loss_weight = 0 and ibot.loss_weight = 0 leave nothing to learn; set one above 0."),
        )


def _precision_faults(config: Config) -> Iterator[Fault]:
    precision = config.compute_precision
    keys = ("compute_precision", "precision")
    of = {(network, module): getattr(getattr(precision, network), module) for network, module in MODULES}
    in_fp16 = [
        m for (n, m), one in of.items() if n == "student" and one.mixed_precision.param_dtype == "fp16"
    ]
    if in_fp16 and not precision.grad_scaler:
        yield (
            keys,
            (
                f"compute_precision.grad_scaler = false while student.{in_fp16[0]} computes in fp16, where gradients "
                "underflow without a scaler; set it to true or use bf16."
            ),
        )
    fp8 = config.performance.fp8
    for network in {"none": (), "teacher": ("teacher",), "all": ("student", "teacher")}[fp8]:
        dtype = of[network, "backbone"].mixed_precision.param_dtype
        if dtype != "bf16":
            yield (
                (*keys, "performance.fp8"),
                (
                    f"performance.fp8 = {fp8} goes with bf16, while compute_precision.{network}.backbone.mixed_precision."
                    f"param_dtype = {dtype}; set bf16 there, or performance.fp8 = none."
                ),
            )
    for module in ("backbone", "dino_head", "ibot_head"):
        ours, theirs = of["student", module].sharding_strategy, of["teacher", module].sharding_strategy
        if ours != theirs and {ours, theirs} != {"SHARD_GRAD_OP", "FULL_SHARD"}:
            yield (
                keys,
                (
                    f"compute_precision.student.{module}.sharding_strategy = {ours} and teacher's = {theirs} place the "
                    f"weights differently, but the teacher follows the student shard by shard; set {ours} for both."
                ),
            )
