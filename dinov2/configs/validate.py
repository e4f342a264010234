"""Checks of values and of combinations of values, before any model, data or GPU is touched."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from dinov2.configs.decode import keys_of
from dinov2.configs.fields import accepted, shortened
from dinov2.configs.older_keys import MODULES
from dinov2.configs.schema import Config, Range

_MOST_PATCHES = 1 << 16  # of one view
_MOST_WEIGHTS = 1 << 31  # of one layer of a head
_MOST_STEPS = 10**9
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])+|\blosses\b")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault, one per line."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def validate(config: Config, world_size: int) -> None:
    """Refuse values out of range and combinations that cannot work with a number of training processes.

    Raises ConfigError, which lists every fault with the key, its value and what would be accepted.
    """
    out_of_range = {
        path: f"{path} = {shortened(value)} is out of range; expected {accepted(hint, key)}."
        for path, hint, key, value in keys_of(config)
        if not key.accepts(value)
    }
    faults = [*out_of_range.values(), *combination_faults(config, world_size, out_of_range)]
    # The loader, which names other faults too, does not know the number of processes.
    if faults := faults or [*_group_faults(config, world_size)]:
        raise ConfigError(faults)


def combination_faults(config: Config, world_size: int, faulty: Collection[str] = ()) -> list[str]:
    """Faults of values that are right by themselves.

    Each sentence names all keys that it judges by. Where one of them, a section around it or an entry of it is
    ``faulty``, its value is not the user's, and the sentence is left out.
    """

    def is_judged(sentence: str) -> bool:
        return not any(
            f"{key}.".startswith(f"{bad}.") or bad.startswith((f"{key}.", f"{key}["))
            for key in _KEY.findall(sentence)
            for bad in faulty
        )

    found = chain(
        _crop_faults(config), _window_faults(config), _gram_faults(config), _mask_faults(config), _data_faults(config),
        _online_faults(config), _step_faults(config, world_size), _range_faults(config), _network_faults(config),
        _precision_faults(config),
    )  # fmt: skip
    return list(filter(is_judged, found))


def _crop_faults(config: Config) -> Iterator[str]:
    crops, patch = config.crops, config.student.patch_size
    for name in ("global_crops_size", "local_crops_size", "gram_teacher_crops_size"):
        size = getattr(crops, name) or patch  # of the gram teacher none may be given
        below, patches = size // patch * patch, (size // patch) ** 2
        if size % patch:
            near = " or ".join(str(side) for side in (below, below + patch) if side)
            yield f"crops.{name} = {size} is not a multiple of student.patch_size = {patch}; {near} would be."
        elif patches > _MOST_PATCHES:
            yield (
                f"crops.{name} = {size} and student.patch_size = {patch} make {patches:,} patches per view; at most "
                f"{_MOST_PATCHES:,} are accepted."
            )
    key, kernel = "augmentation.blur_kernel_size", config.augmentation.blur_kernel_size
    if kernel % 2 == 0:
        yield f"{key} = {kernel} is not an odd number of 1 or more."
    smallest = min(crops.global_crops_size, crops.local_crops_size)
    if kernel // 2 >= smallest:
        yield (
            f"{key} = {kernel} is too wide for views of {smallest} px, the smaller of crops.global_crops_size and "
            f"crops.local_crops_size; expected below {2 * smallest}."
        )


def _gram_faults(config: Config) -> Iterator[str]:
    crops, gram = config.crops, config.losses.get("gram")
    size, pure = crops.gram_teacher_crops_size, crops.gram_teacher_no_distortions
    if size is None and not pure:
        return
    has_teacher = gram is not None and gram.is_used and not gram.ema_teacher
    key, other = f"crops.gram_teacher_crops_size = {size}", "crops.gram_teacher_no_distortions"
    if size is None:
        if has_teacher:
            yield f"{other} = true has no effect without crops.gram_teacher_crops_size; give one, or set false."
    elif not has_teacher:
        yield (
            f"{key} is a view for a frozen gram teacher, which section losses does not have; set it to null, or give "
            "losses.gram with ema_teacher: false."
        )
    elif not pure and size != crops.global_crops_size:
        yield (
            f"{key} with {other} = false is not crops.global_crops_size = {crops.global_crops_size}: views of another "
            f"size are taken undistorted only; set {other} = true, or the size to null."
        )


def _mask_faults(config: Config) -> Iterator[str]:
    ratio, probability = "ibot.mask_ratio_min_max", "ibot.mask_sample_probability"
    (low, high), masked = config.ibot.mask_ratio_min_max, config.ibot.mask_sample_probability
    if masked * 4 % 1:
        yield (
            f"{probability} = {masked} is not a multiple of 0.25; masks are stratified over the four global crops of "
            "two images, so 0, 0.25, 0.5, 0.75 or 1 are accepted."
        )
    side = config.crops.global_crops_size // config.student.patch_size
    if config.ibot.loss_weight > 0 and (masked == 0 or side < 2 or side * side * high < 1):
        yield (
            f"ibot.loss_weight = {config.ibot.loss_weight} needs masked patches, but {probability} = {masked} and "
            f"{ratio} = [{low}, {high}] mask none of {side} x {side} patches (crops.global_crops_size by "
            "student.patch_size); set the weight to 0 or raise the two."
        )


def _data_faults(config: Config) -> Iterator[str]:
    data = config.data
    expected = "a folder, a file, a hub dataset or a URL"
    if not data.path and not data.datasets:
        yield f"data.path is empty; give {expected}, or several in data.datasets."
    if data.path and data.datasets:
        yield f"data.path = {shortened(data.path)} and data.datasets name different data; use one."
    if data.revision and data.datasets:
        yield f"data.revision = {shortened(data.revision)} does not reach data.datasets; give each entry its own."
    if data.patient_pattern and (fault := _pattern_fault(data.patient_pattern)):
        expected = "a regular expression with the groups patient, slide or site is expected"
        yield f"data.patient_pattern = {shortened(data.patient_pattern)} {fault}; {expected}, as (?P<patient>P\\d+)."
    for number, dataset in enumerate(data.datasets):
        if not dataset.path:
            yield f"data.datasets[{number}].path is empty; give {expected}."
    for number, labelled in enumerate(config.evaluation.labelled):
        if not labelled.path:
            yield f"evaluation.labelled[{number}].path is empty; give a folder of labelled tiles."


def _pattern_fault(pattern: str) -> str:
    try:
        groups = set(re.compile(pattern).groupindex)
    except re.error as error:
        return f"is none ({error})"
    return "" if groups and groups <= {"patient", "slide", "site"} else f"has the groups {sorted(groups)}"


def _online_faults(config: Config) -> Iterator[str]:
    online = config.online
    key = "online.magnifications" if online.magnifications else "online.mpp"
    wanted = list(online.magnifications or online.mpp)
    if not wanted or len(set(wanted)) < len(wanted):
        yield f"{key} = {shortened(wanted)} is not a list of different numbers above 0."
    if online.mpp_weights and len(online.mpp_weights) != len(wanted):
        weights = f"online.mpp_weights = {shortened(list(online.mpp_weights))}"
        yield f"{weights} does not give each of {key} = {shortened(wanted)} a number above 0."


def _step_faults(config: Config, world_size: int) -> Iterator[str]:
    batch, optim, epoch = config.train.batch_size_per_gpu, config.optim, config.train.OFFICIAL_EPOCH_LENGTH
    if optim.epochs != "auto":
        steps = min(optim.epochs, optim.early_stop or optim.epochs) * epoch
        images = optim.epochs * epoch * (2 if batch == "auto" else batch) * world_size * optim.accumulation_steps
        if round(steps) == 0 or optim.epochs * epoch > _MOST_STEPS or images >= 2**62:
            yield (
                f"optim.epochs = {optim.epochs}, optim.early_stop = {optim.early_stop} and train.OFFICIAL_EPOCH_LENGTH "
                f"= {epoch} make {steps:g} steps; at least one is expected, and {_MOST_STEPS:,} at most."
            )
    every, period = config.train.keep_checkpoints_every, config.train.checkpoint_period_iterations
    if every % period:
        yield (
            f"train.keep_checkpoints_every = {every} is not a multiple of train.checkpoint_period_iterations = "
            f"{period}, so that most of these steps have no checkpoint; 0 or a multiple is expected."
        )
    neighbours = batch * (world_size if config.dino.koleo_gather else 1) if batch != "auto" else math.inf
    if config.dino.koleo_loss_weight > 0 and 1 < neighbours <= config.dino.koleo_topk:
        yield (
            f"dino.koleo_topk = {config.dino.koleo_topk} of {neighbours} images, of which each has {neighbours - 1} "
            "others; at most as many are expected."
        )
    if batch == 1:
        yield from _single_image_faults(config, world_size)
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0 and not config.losses:
        yield "dino.loss_weight = 0 and ibot.loss_weight = 0 without losses leave nothing to learn; set one above 0."


def _single_image_faults(config: Config, world_size: int) -> Iterator[str]:
    """Losses of one image per process that need another one beside it."""
    one = "train.batch_size_per_gpu = 1"
    for name in ("koleo", "kde"):
        weight, gather = (getattr(config.dino, f"{name}_{key}") for key in ("loss_weight", "gather"))
        if weight > 0 and not (gather and world_size > 1):
            remedy = f", or dino.{name}_gather = true" if world_size > 1 else ""
            yield (
                f"dino.{name}_loss_weight = {weight} needs another image to spread the class tokens from, while {one}; "
                f"set it to 0{remedy}."
            )
    if config.train.centering == "sinkhorn_knopp" and world_size == 1:
        yield (
            f"train.centering = sinkhorn_knopp shares prototypes out over the images of a batch, while {one} in one "
            "process, where the targets would tell nothing apart; set it to centering."
        )


def _group_faults(config: Config, world_size: int) -> Iterator[str]:
    dino, size = config.dino, config.train.batch_size_per_gpu
    group, topk = dino.koleo_group, dino.koleo_topk
    if not (group and dino.koleo_loss_weight > 0):
        return
    images = size if size == "auto" else size * (world_size if dino.koleo_gather else 1)
    if images != "auto" and images % group:
        told = f"of train.batch_size_per_gpu = {size}"
        told += f" x {world_size} processes (dino.koleo_gather = true)" if dino.koleo_gather else ""
        yield f"dino.koleo_group = {group} does not divide the {images} images {told}; give a divisor, or 0 for all."
    if group <= topk:
        yield (
            f"dino.koleo_group = {group} images hold no dino.koleo_topk = {topk} neighbours of one; give {topk + 1} or "
            "more, or 0 for all."
        )


def _range_faults(config: Config) -> Iterator[str]:
    for key, hint, _, value in keys_of(config):
        if hint == Range and key.endswith(("_scale", "_min_max", "ramp_epochs")) and value[0] > value[1]:
            yield f"{key} = {list(value)} is not a range; expected min <= max."


def _window_faults(config: Config) -> Iterator[str]:
    crops = config.crops
    if not crops.localcrops_subset_of_globalcrops:
        return
    if crops.local_crops_number % 2:
        yield (
            f"crops.local_crops_number = {crops.local_crops_number} is odd, while "
            "crops.localcrops_subset_of_globalcrops cuts half of them out of either global view; an even number is "
            "expected."
        )
    if crops.local_crops_size > crops.global_crops_size:
        yield (
            f"crops.local_crops_size = {crops.local_crops_size} is more than crops.global_crops_size = "
            f"{crops.global_crops_size}, out of which crops.localcrops_subset_of_globalcrops cuts; at most that is "
            "expected."
        )


def _network_faults(config: Config) -> Iterator[str]:
    for section in ("dino", "ibot"):
        head = getattr(config, section)
        bottleneck = head.head_bottleneck_dim
        for name in ("head_n_prototypes", "head_hidden_dim"):
            side = getattr(head, name)
            if side * bottleneck > _MOST_WEIGHTS:
                yield (
                    f"{section}.{name} = {side} and {section}.head_bottleneck_dim = {bottleneck} make a layer of "
                    f"{side * bottleneck:,} weights; at most {_MOST_WEIGHTS:,} are accepted."
                )
    weights = {
        f"MODEL.WEIGHTS = {config.MODEL.WEIGHTS} (a teacher export with its heads)": config.MODEL.WEIGHTS,
        f"student.pretrained_weights = {config.student.pretrained_weights} (a backbone)": (
            config.student.pretrained_weights
        ),
        "train.use_pretrained = true (Meta's published backbone)": config.train.use_pretrained,
    }
    if len(named := [what for what, given in weights.items() if given]) > 1:
        yield (
            f"{' and '.join(named)} are different weights to start from; keep one, and give the others as '' (paths) "
            "or false."
        )


def _precision_faults(config: Config) -> Iterator[str]:
    precision, fp8 = config.compute_precision, config.performance.fp8
    for network, module in MODULES:
        dtype = getattr(getattr(precision, network), module).mixed_precision.param_dtype
        key = f"compute_precision.{network}.{module}.mixed_precision.param_dtype"
        if network == "student" and dtype == "fp16" and not precision.grad_scaler:
            yield (
                f"compute_precision.grad_scaler = false while {key} = fp16, where gradients underflow without a scaler"
                "; set it to true or use bf16."
            )
        if module == "backbone" and fp8 in (network, "all") and dtype != "bf16":
            goes = f"performance.fp8 = {fp8} goes with bf16"
            yield f"{goes}, while {key} = {dtype}; set bf16 there, or performance.fp8 = none."
    for module in ("backbone", "dino_head", "ibot_head"):
        ours, theirs = (getattr(part, module).sharding_strategy for part in (precision.student, precision.teacher))
        if ours != theirs and {ours, theirs} != {"SHARD_GRAD_OP", "FULL_SHARD"}:
            yield (
                f"compute_precision.student.{module}.sharding_strategy = {ours} and "
                f"compute_precision.teacher.{module}.sharding_strategy = {theirs} place the weights differently, but "
                f"the teacher follows the student shard by shard; set {ours} for both."
            )
