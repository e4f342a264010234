"""Files of Meta's DINOv3, and of Path-FM on it: their keys in ours.

What a key asks for that there is no counterpart of, is named as a fault, with the value that would be accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dinov2.configs.fields import shortened
from dinov2.configs.older_keys import MODULES, merge


class _Meaning(NamedTuple):
    """What a key of theirs says: in ours, or why it says nothing, or for which values alone it says nothing."""

    new: str | Callable[[Any], Mapping[str, Any]] = ""  # key, or from a value to keys and values
    only: tuple[Any, ...] = ()
    instead: str = ""  # what there is here in its place


_NOTHING = _Meaning()  # how the work is done, not what comes of it
_OFF = _Meaning(only=(None, False))
_ARCHS = {
    # Width, blocks, heads and hidden width by input width; the names are those of DINOv2's networks, which differ.
    "vit_small": (384, 12, 6, 4.0), "vit_base": (768, 12, 12, 4.0), "vit_large": (1024, 24, 16, 4.0),
    "vit_so400m": (1152, 27, 18, 3.777777778), "vit_huge2": (1280, 32, 20, 4.0), "vit_giant2": (1536, 40, 24, 4.0),
    "vit_7b": (4096, 40, 32, 3.0),
}  # fmt: skip
_DISTIL = "losses.distillation.teacher = WEIGHTS distils the tokens of a backbone, without its heads"
_NO_KEEP = 10**12  # and more: every so many steps none is kept beside the newest


def _arch(name: str) -> dict[str, Any]:
    if name not in _ARCHS:
        return {"student.arch": name}
    sizes = zip(("embed_dim", "depth", "num_heads", "ffn_ratio"), _ARCHS[name], strict=True)
    return {"student.arch": "dinov3_vit"} | {f"student.options.{size}": value for size, value in sizes}


def _option(name: str) -> _Meaning:
    return _Meaning(f"student.options.{name}")


def _mixed(key: str) -> _Meaning:
    modules = [f"compute_precision.{network}.{module}" for network, module in MODULES]
    return _Meaning(lambda value: {f"{module}.{key}": value for module in modules})


def _recompute(kind: str) -> _Meaning:
    return _Meaning(lambda value: {"performance.recompute": kind} if value else {})


_OPTIONS = (
    "qkv_bias", "proj_bias", "ffn_bias", "ffn_layer", "ffn_ratio", "norm_layer", "n_storage_tokens", "mask_k_bias",
    "untie_cls_and_patch_norms", "untie_global_and_local_cls_norm", "pos_embed_rope_base", "pos_embed_rope_min_period",
    "pos_embed_rope_max_period", "pos_embed_rope_normalize_coords", "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords", "pos_embed_rope_rescale_coords",
)  # fmt: skip
_STAINS = {
    "hed_prob": 0.5, "brightness": 0.2, "contrast": 0.2, "saturation": 0.1, "hue": 0.05,
    "steps.solarize.prob_global2": 0.0,
}  # fmt: skip
_LABELS = ("entity", "group", "job_type", "run_name", "tags")
_MEANINGS = {
    "MODEL.META_ARCHITECTURE": _Meaning(only=("SSLMetaArch",)),
    "MODEL.DEVICE": _NOTHING,
    "MODEL.DTYPE": _Meaning(only=("float32",)),
    "compute_precision.param_dtype": _Meaning("precision"),
    "compute_precision.reduce_dtype": _mixed("mixed_precision.reduce_dtype"),
    "compute_precision.sharding_strategy": _mixed("sharding_strategy"),
    "dino.global_ignore_diagonal": _Meaning(only=(True,)),
    "dino.koleo_loss_distributed": _Meaning("dino.koleo_gather"),
    "dino.koleo_distributed_replicas": _Meaning(only=(0,)),
    "dino.koleo_distributed_loss_group_size": _Meaning(lambda value: {"dino.koleo_group": value or 0}),
    "dino.koleo_distributed_loss_group_data": _NOTHING,  # which ranks a group is of, where there are groups
    "dino.force_weight_norm": _OFF,
    **{f"{head}.head_norm_last_layer": _OFF for head in ("dino", "ibot")},
    "ibot.mask_random_circular_shift": _OFF,
    "ibot.force_masking_even_with_zero_weight": _OFF,
    "train.data_config": _Meaning(only=(None,)),
    "train.monitor_gradient_norm": _NOTHING,  # it always is
    "train.chunk_schedule": _Meaning(only=([], None)),
    "train.use_teacher_head": _Meaning(only=(True,)),
    "train.learn_from_teacher_tokens": _OFF,
    "train.checkpointing": _recompute("selective"),
    "train.checkpointing_full": _recompute("full"),
    "train.compile": _Meaning("performance.compile"),
    "train.cudagraphs": _NOTHING,
    "train.sharded_eval_checkpoint": _NOTHING,
    "train.cell_augmentation": _OFF,
    "train.cell_augmentation_type": _NOTHING,
    "train.eval_and_ckpt_at_step0": _NOTHING,
    "train.streaming_dataset.path": _Meaning("train.streaming_dataset_path"),
    "train.streaming_dataset.split": _Meaning(only=("train",)),
    **{
        f"train.streaming_dataset.{name}": _NOTHING  # the order is ours, see docs/data.md
        for name in ("shuffle_buffer", "base_seed", "samples_per_epoch", "reshuffle_every")
    },
    "student.arch": _Meaning(_arch),
    "student.layerscale": _option("layerscale_init"),
    "student.resume_from_teacher_chkpt": _Meaning("student.pretrained_weights"),
    "student.patch_drop": _Meaning(only=(0.0, None)),
    "student.in_chans": _Meaning(only=(3,)),
    "student.pos_embed_type": _Meaning(only=("rope",)),
    "student.pos_embed_rope_dtype": _NOTHING,  # float32, since bf16 cannot tell neighbouring patches apart
    "student.fp8_enabled": _Meaning(lambda value: {"performance.fp8": "all" if value else "none"}),
    "student.fp8_filter": _Meaning(only=("blocks",)),
    **{f"student.{name}": _option(name) for name in _OPTIONS},
    "teacher.in_chans": _Meaning(only=(3,)),
    "distillation.enabled": _Meaning(only=(None, False), instead=_DISTIL),
    "multidistillation.enabled": _Meaning(only=(None, False), instead=f"{_DISTIL}, one student a run"),
    "hrft.enabled": _OFF,
    **{f"{name}.checkpoint_path": _NOTHING for name in ("distillation", "hrft")},  # what is off needs none
    "distillation.full_cfg_path": _NOTHING,
    "optim.optimizer": _Meaning(only=("adamw",)),
    "optim.lr": _Meaning("optim.base_lr"),
    "optim.scaling_rule": _Meaning(
        lambda value: {"optim.scaling_rule": "four_sqrt_wrt_1024" if value == "sqrt_wrt_1024" else value}
    ),
    "optim.schedule_trunc_extra": _Meaning(only=(0.0, None)),
    "optim.dino_head_wd_multiplier": _Meaning(only=(1.0,)),
    "optim.multi_tensor_optim": _NOTHING,
    "optim.dump_fsdp_weights_path": _Meaning(only=("", None)),
    "crops.global_local_crop_pairs_ratios": _Meaning(only=(1.0,)),
    "crops.share_color_jitter": _Meaning("augmentation.jitter_per_tile"),
    "crops.horizontal_flips": _Meaning(lambda value: {"augmentation.horizontal_flip_prob": 0.5 if value else 0.0}),
    "crops.rgb_mean": _Meaning("augmentation.normalize_mean"),
    "crops.rgb_std": _Meaning("augmentation.normalize_std"),
    "crops.teacher_to_student_resolution_scale": _Meaning(only=(1.0,)),
    "crops.use_pathology_hed": _Meaning(
        lambda value: {f"augmentation.{name}": number for name, number in _STAINS.items()} if value else {}
    ),
    "evaluation.low_freq_every": _NOTHING,
    "evaluation.config_files.high_freq": _NOTHING,
    "evaluation.config_files.low_freq": _NOTHING,
    "checkpointing.allow_resume": _Meaning(lambda value: {"train.skip_checkpointer": not value}),
    "checkpointing.period": _Meaning("train.checkpoint_period_iterations"),
    "checkpointing.max_to_keep": _Meaning("train.keep_checkpoints"),
    "checkpointing.keep_every": _Meaning(
        lambda value: {"train.keep_checkpoints_every": 0 if isinstance(value, int) and value > _NO_KEEP else value}
    ),
    "logging.use_wandb": _Meaning("logging.wandb"),
    "logging.project": _Meaning("logging.wandb_project"),
    **{f"logging.{name}": _Meaning(only=(None, [], "")) for name in _LABELS},
    "logging.artifact_logging": _NOTHING,
}
_SCHEDULED = {  # by a schedule of that name, so that null stands beside it
    "optim.lr", "optim.min_lr", "optim.warmup_epochs", "optim.freeze_last_layer_epochs", "optim.weight_decay",
    "optim.weight_decay_end", "teacher.momentum_teacher", "teacher.final_momentum_teacher",
    "teacher.warmup_teacher_temp", "teacher.teacher_temp", "teacher.warmup_teacher_temp_epochs",
}  # fmt: skip
_TELLING = (
    "student.pos_embed_type", "student.n_storage_tokens", "student.mask_k_bias", "student.pos_embed_rope_dtype",
    "compute_precision.param_dtype", "checkpointing.period",
)  # fmt: skip


def is_dinov3(values: Mapping[str, Any]) -> bool:
    """Whether a file has keys that only DINOv3's have."""
    paths = {path for path, _ in _leaves(values)}
    return any(key in paths for key in _TELLING)


def translate(values: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """A file of theirs in our keys and those that are the same; adds a sentence to ``faults`` for what has none."""
    leaves = dict(sorted(_leaves(values), key=lambda leaf: leaf[0] != "student.arch"))  # first: others win over it
    if leaves.pop("dino.reweight_dino_local_loss", False) is False:  # the schedule stands there all the same
        leaves = {key: value for key, value in leaves.items() if not key.startswith("dino.local_loss_weight_schedule")}
    if leaves.get("dino.koleo_loss_distributed") is False:  # which alone has groups
        leaves.pop("dino.koleo_distributed_loss_group_size", None)
    translated: dict[str, Any] = {}
    for key, value in leaves.items():
        meaning = _MEANINGS.get(key)
        if meaning is None or meaning.new == key:
            if not (value is None and key in _SCHEDULED):
                translated = merge(translated, _nested(key, value))
        elif meaning.only and not any(value == one and type(value) is type(one) for one in _alike(meaning.only)):
            named = " or ".join("null" if one is None else str(one).lower() or "''" for one in meaning.only)
            named += f" is accepted, and {meaning.instead}." if meaning.instead else " is accepted."
            faults.append(f"{key} = {shortened(value)} of DINOv3 has no counterpart here; {named}")
        elif callable(meaning.new):
            for new, converted in meaning.new(value).items():
                translated = merge(translated, _nested(new, converted))
        elif meaning.new and not (value is None and key in _SCHEDULED):
            translated = merge(translated, _nested(meaning.new, value))
    return translated


def _alike(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        yield value
        if type(value) is float:
            yield int(value)


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        here = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{here}.")
        else:
            yield here, value


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value
