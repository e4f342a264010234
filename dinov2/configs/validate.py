"""Checks of values and of combinations of values, before any model, data or GPU is touched."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from dinov2.configs.loader import ConfigError
from dinov2.configs.schema import Config
from dinov2.extensions import BACKBONES

_SHARES = (  # numbers in [0, 1]
    "ibot.mask_sample_probability",
    "train.max_damaged_share",
    "online.min_foreground",
    "augmentation.horizontal_flip_prob",
    "augmentation.vertical_flip_prob",
    "augmentation.hed_prob",
    "augmentation.jitter_prob",
    "augmentation.grayscale_prob",
    "augmentation.blur_prob_global1",
    "augmentation.blur_prob_global2",
    "augmentation.blur_prob_local",
    "teacher.momentum_teacher",
    "teacher.final_momentum_teacher",
)
_POSITIVE = (
    "train.OFFICIAL_EPOCH_LENGTH",
    "train.prefetch_factor",
    "train.stream_block_rows",
    "train.stream_memory_gib",
    "train.stream_attempts",
    "train.checkpoint_period_iterations",
    "train.keep_checkpoints",
    "train.tile_size",
    "student.patch_size",
    "crops.global_crops_size",
    "crops.local_crops_size",
    "dino.head_n_prototypes",
    "dino.head_bottleneck_dim",
    "dino.head_nlayers",
    "dino.head_hidden_dim",
    "dino.kde_kappa",
    "ibot.head_n_prototypes",
    "ibot.head_bottleneck_dim",
    "ibot.head_nlayers",
    "ibot.head_hidden_dim",
    "teacher.warmup_teacher_temp",
    "teacher.teacher_temp",
    "optim.epochs",
    "optim.base_lr",
    "optim.layerwise_decay",
    "evaluation.eval_period_iterations",
    "evaluation.probe_tiles",
    "logging.period_iterations",
)
_NON_NEGATIVE = (
    "train.seed",
    "train.num_workers",
    "train.stream_lanes",
    "online.max_patches",
    "train.unfreeze_last_n_blocks",
    "performance.prefetch_blocks",
    "student.num_register_tokens",
    "student.layerscale",
    "crops.local_crops_number",
    "dino.loss_weight",
    "dino.koleo_loss_weight",
    "dino.kde_loss_weight",
    "ibot.loss_weight",
    "augmentation.hed_shift",
    "augmentation.hed_scale",
    "augmentation.brightness",
    "augmentation.contrast",
    "augmentation.saturation",
    "optim.warmup_epochs",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.clip_grad",
    "optim.freeze_last_layer_epochs",
    "optim.patch_embed_lr_mult",
    "teacher.warmup_teacher_temp_epochs",
)
_BELOW_ONE = ("train.validation_share", "student.drop_path_rate", "optim.adamw_beta1", "optim.adamw_beta2")


def validate(config: Config, world_size: int) -> None:
    """Refuse values out of range and combinations that cannot work.

    Args:
        config: the decoded configuration.
        world_size: number of training processes.

    Raises:
        ConfigError: listing every fault with the key, its value and what would be accepted.
    """
    faults = [*_arch_faults(config), *_range_faults(config), *_crop_faults(config), *_mask_faults(config)]
    faults += [*_data_faults(config), *_training_faults(config, world_size), *_precision_faults(config)]
    if faults:
        raise ConfigError(faults)


def _arch_faults(config: Config) -> Iterator[str]:
    if problem := BACKBONES.problem(config.student.arch):
        yield f"student.arch = {config.student.arch!r}: {problem}"


def _range_faults(config: Config) -> Iterator[str]:
    rules = (
        (_SHARES, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
        (_POSITIVE, lambda x: x > 0, "a number above 0"),
        (_NON_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (_BELOW_ONE, lambda x: 0 <= x < 1, "a number in [0, 1)"),
        (("augmentation.hue",), lambda x: 0 <= x <= 0.5, "a number in [0, 0.5]"),
    )
    for keys, accepts, expected in rules:
        for key in keys:
            value = attrgetter(key)(config)
            if not accepts(value):
                yield f"{key} = {value} is out of range; expected {expected}."


def _crop_faults(config: Config) -> Iterator[str]:
    patch = config.student.patch_size
    for key in ("global_crops_size", "local_crops_size"):
        size = getattr(config.crops, key)
        if patch > 0 and size % patch:
            below = size // patch * patch
            near = " or ".join(str(s) for s in (below, below + patch) if s)
            yield f"crops.{key} = {size} is not a multiple of student.patch_size = {patch}; {near} would be."
    for key in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(config.crops, key)
        if not 0 < low <= high <= 1:
            yield f"crops.{key} = [{low}, {high}] is not a range of area shares; expected 0 < min <= max <= 1."
    low, high = config.augmentation.blur_sigma_min_max
    if not 0 < low <= high:
        yield f"augmentation.blur_sigma_min_max = [{low}, {high}] is not a range; expected 0 < min <= max."
    kernel = config.augmentation.blur_kernel_size
    if kernel < 1 or kernel % 2 == 0:
        yield f"augmentation.blur_kernel_size = {kernel} is not an odd number of 1 or more."
    smallest = min(config.crops.global_crops_size, config.crops.local_crops_size)
    if kernel // 2 >= smallest > 0:
        wide = f"augmentation.blur_kernel_size = {kernel} is too wide for views of {smallest} px"
        yield f"{wide}; expected below {2 * smallest}."
    if config.augmentation.backend == "reference" and config.train.augmentation_device == "gpu":
        yield (
            "augmentation.backend = reference runs on the CPU only, while train.augmentation_device = gpu; set one of "
            "the two to fast or cpu."
        )
    if min(config.augmentation.normalize_std) <= 0:
        std = list(config.augmentation.normalize_std)
        yield f"augmentation.normalize_std = {std} holds a number that is not above 0."


def _mask_faults(config: Config) -> Iterator[str]:
    low, high = config.ibot.mask_ratio_min_max
    if not 0 <= low <= high <= 1:
        yield f"ibot.mask_ratio_min_max = [{low}, {high}] is not a range in [0, 1] with min <= max."
    share = config.ibot.mask_sample_probability
    if share * 4 % 1:
        yield (
            f"ibot.mask_sample_probability = {share} is not a multiple of 0.25; masks are stratified over the "
            "four global crops of two images, so 0, 0.25, 0.5, 0.75 or 1 are accepted."
        )
    side = config.crops.global_crops_size // max(config.student.patch_size, 1)
    if config.ibot.loss_weight > 0 and (share == 0 or side < 2 or side * side * high < 1):
        yield (
            f"ibot.loss_weight = {config.ibot.loss_weight} needs masked patches, but "
            f"ibot.mask_sample_probability = {share} and ibot.mask_ratio_min_max = [{low}, {high}] mask none of "
            f"{side} x {side} patches; set the weight to 0 or raise the two."
        )


def _data_faults(config: Config) -> Iterator[str]:
    train = config.train
    if train.online_patching:
        yield from _online_faults(config)
        return
    key, kind = (
        ("streaming_dataset_path", "a folder of Parquet shards, a hub id or a URL")
        if train.streaming_from_hf
        else ("sample_list_path", "a sample list")
    )
    path = getattr(train, key)
    if not path and not train.datasets:
        yield (
            f"train.{key} is empty while train.streaming_from_hf = {str(train.streaming_from_hf).lower()}; give "
            f"{kind}, or several in train.datasets."
        )
    if path and train.datasets:
        yield f"train.{key} = {path} and train.datasets name different data; use one."
    if train.streaming_dataset_revision and train.datasets:
        yield "train.streaming_dataset_revision does not reach train.datasets; give each entry its own revision."
    for number, dataset in enumerate(train.datasets):
        if not dataset.path:
            yield f"train.datasets[{number}].path is empty; give {kind}."
        if dataset.weight <= 0:
            yield f"train.datasets[{number}].weight = {dataset.weight} is out of range; expected a number above 0."


def _online_faults(config: Config) -> Iterator[str]:
    online = config.online
    if not online.slides:
        yield "online.slides is empty while train.online_patching = true; give a folder, a list or a CSV of slides."
    if config.train.datasets:
        yield "train.datasets and train.online_patching = true name different data; use one."
    key = "magnifications" if online.magnifications else "mpp"
    wanted = getattr(online, key)
    if not wanted or min(wanted) <= 0 or len(set(wanted)) < len(wanted):
        yield f"online.{key} = {list(wanted)} is not a list of different numbers above 0."
    if online.mpp_weights and (len(online.mpp_weights) != len(wanted) or min(online.mpp_weights) <= 0):
        yield (
            f"online.mpp_weights = {list(online.mpp_weights)} does not give each of online.{key} = {list(wanted)} a "
            "number above 0."
        )
    if not 0 < online.slide_share <= 1:
        yield f"online.slide_share = {online.slide_share} is out of range; expected a number in (0, 1]."


def _training_faults(config: Config, world_size: int) -> Iterator[str]:
    batch = config.train.batch_size_per_gpu
    if batch == "auto":
        batch = 2  # the least that it can become
    if batch <= 0:
        yield f"train.batch_size_per_gpu = {batch} is out of range; expected an even number above 0, or auto."
    if batch % 2:
        yield f"train.batch_size_per_gpu = {batch} is odd; masks are stratified over pairs of images, so it is even."
    optim = config.optim
    last_epoch = optim.epochs if optim.early_stop is None else optim.early_stop
    if optim.early_stop is not None and not 0 < optim.early_stop <= optim.epochs:
        yield f"optim.early_stop = {optim.early_stop} is not in (0, optim.epochs = {optim.epochs}]; null means epochs."
    if optim.warmup_epochs > optim.epochs:
        yield f"optim.warmup_epochs = {optim.warmup_epochs} exceeds optim.epochs = {optim.epochs}."
    steps = last_epoch * config.train.OFFICIAL_EPOCH_LENGTH
    if steps > 0 and round(steps) == 0:
        yield (
            f"optim.epochs = {optim.epochs}, optim.early_stop = {optim.early_stop} and train.OFFICIAL_EPOCH_LENGTH = "
            f"{config.train.OFFICIAL_EPOCH_LENGTH} make {steps:g} steps; at least one is expected."
        )
    for number, labelled in enumerate(config.evaluation.labelled):
        if not labelled.path:
            yield f"evaluation.labelled[{number}].path is empty; give a folder of labelled tiles."
    weights = {
        "MODEL.WEIGHTS": config.MODEL.WEIGHTS,
        "student.pretrained_weights": config.student.pretrained_weights,
        "train.use_pretrained": config.train.use_pretrained,
    }
    named = [f"{key} = {value}" for key, value in weights.items() if value]
    if len(named) > 1:
        yield f"{' and '.join(named)} name different starting weights; use one."
    rows = batch * (world_size if config.dino.kde_gather else 1)
    if config.dino.kde_loss_weight > 0 and rows < 2:
        yield f"dino.kde_loss_weight = {config.dino.kde_loss_weight} needs at least 2 images; the batch has {rows}."
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0:
        yield "dino.loss_weight = 0 and ibot.loss_weight = 0 leave nothing to learn; set one above 0."


def _precision_faults(config: Config) -> Iterator[str]:
    student = config.compute_precision.student
    in_fp16 = [m for m in ("backbone", "dino_head", "ibot_head")
               if getattr(student, m).mixed_precision.param_dtype == "fp16"]  # fmt: skip
    if in_fp16 and not config.compute_precision.grad_scaler:
        yield (
            f"compute_precision.grad_scaler = false while student.{in_fp16[0]} computes in fp16, where gradients "
            "underflow without a scaler; set it to true or use bf16."
        )
    for network in {"none": (), "teacher": ("teacher",), "all": ("student", "teacher")}[
        config.performance.fp8
    ]:
        dtype = getattr(config.compute_precision, network).backbone.mixed_precision.param_dtype
        if dtype != "bf16":
            yield (
                f"performance.fp8 = {config.performance.fp8} goes with bf16, while compute_precision.{network}."
                f"backbone.mixed_precision.param_dtype = {dtype}; set bf16 there, or performance.fp8 = none."
            )
    for module in ("backbone", "dino_head", "ibot_head"):
        ours, theirs = (
            getattr(network, module).sharding_strategy
            for network in (config.compute_precision.student, config.compute_precision.teacher)
        )
        if ours != theirs and {ours, theirs} != {"SHARD_GRAD_OP", "FULL_SHARD"}:
            yield (
                f"compute_precision.student.{module}.sharding_strategy = {ours} and teacher's = {theirs} place the "
                f"weights differently, but the teacher follows the student shard by shard; set {ours} for both."
            )
