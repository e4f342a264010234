"""The configuration's sections, keys and types; one frozen dataclass per YAML section.

Keys are those of DINOv2's ``ssl_default_config.yaml`` and of the OpenMidnight recipe, so that existing YAML
files work as they stand. No field has a default here: ``ssl_default_config.yaml`` supplies every value and is
the one place to read or change a default. ``docs/config.md`` describes each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]
Architecture = Literal["vit_demo", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]
ShardingStrategy = Literal["SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD", "HYBRID_SHARD"]
Switch = Literal["auto", True, False]
Probe = Literal["knn", "linear", "linear_eva", "linear_kaiko", "few_shot", "rankme", "odcorr"]


@dataclass(frozen=True)
class ModelConfig:
    """Section ``MODEL``."""

    WEIGHTS: str


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Dtypes of one module: computation, gradient reduction, buffers."""

    param_dtype: Precision
    reduce_dtype: Precision
    buffer_dtype: Precision


@dataclass(frozen=True)
class ModulePrecisionConfig:
    """Sharding and dtypes of one module (backbone or head)."""

    sharding_strategy: ShardingStrategy
    mixed_precision: MixedPrecisionConfig


@dataclass(frozen=True)
class NetworkPrecisionConfig:
    """Precision of one network (student or teacher), module by module."""

    backbone: ModulePrecisionConfig
    dino_head: ModulePrecisionConfig
    ibot_head: ModulePrecisionConfig


@dataclass(frozen=True)
class ComputePrecisionConfig:
    """Section ``compute_precision``."""

    grad_scaler: bool
    teacher: NetworkPrecisionConfig
    student: NetworkPrecisionConfig


@dataclass(frozen=True)
class DinoConfig:
    """Section ``dino``: the CLS-token loss, its head, and the regularisers of the CLS token."""

    loss_weight: float
    head_n_prototypes: int
    head_bottleneck_dim: int
    head_nlayers: int
    head_hidden_dim: int
    koleo_loss_weight: float
    koleo_gather: bool
    kde_loss_weight: float
    kde_kappa: float
    kde_gather: bool
    kde_reference_sign: bool
    do_kde: bool | None
    do_koleo: bool | None


@dataclass(frozen=True)
class IbotConfig:
    """Section ``ibot``: the masked-patch loss, its masks and its head."""

    loss_weight: float
    mask_sample_probability: float
    mask_ratio_min_max: tuple[float, float]
    separate_head: bool
    head_n_prototypes: int
    head_bottleneck_dim: int
    head_nlayers: int
    head_hidden_dim: int


@dataclass(frozen=True)
class DatasetConfig:
    """One entry of ``train.datasets``: a dataset of a mixture and its share of the samples."""

    path: str = ""
    weight: float = 1.0
    revision: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """Section ``train``: data source, batch, checkpoints."""

    batch_size_per_gpu: int | Literal["auto"]
    output_dir: str
    seed: int
    num_workers: int
    prefetch_factor: int
    augmentation_device: Literal["cpu", "gpu"]
    OFFICIAL_EPOCH_LENGTH: int
    centering: Literal["centering", "sinkhorn_knopp"]
    streaming_from_hf: bool
    online_patching: bool
    streaming_dataset_path: str
    streaming_dataset_revision: str
    datasets: tuple[DatasetConfig, ...]
    exclusion_file: str
    validation_share: float
    sample_list_path: str
    sample_list_columns: Literal[0, 4, 6]
    slide_mpp_file: str
    slide_root: str
    tile_size: int
    stream_lanes: int
    stream_block_rows: int
    stream_memory_gib: float
    stream_attempts: int
    max_damaged_share: float
    use_pretrained: bool
    unfreeze_last_n_blocks: int
    skip_checkpointer: bool | None
    checkpoint_period_iterations: int
    keep_checkpoints: int
    dataset_path: str
    saveckp_freq: int
    cache_dataset: bool


@dataclass(frozen=True)
class OnlineConfig:
    """Section ``online``: patches cut from slides while training, at any place and magnification."""

    slides: str
    weight_column: str
    mpp: tuple[float, ...]
    mpp_weights: tuple[float, ...]
    magnifications: tuple[float, ...]
    min_foreground: float
    slide_share: float
    max_patches: int
    cache_dir: str


@dataclass(frozen=True)
class AugmentationConfig:
    """Section ``augmentation``: every probability and strength of the photometric and geometric transforms."""

    backend: Literal["fast", "reference"]
    horizontal_flip_prob: float
    vertical_flip_prob: float
    hed_prob: float
    hed_shift: float
    hed_scale: float
    hed_clip: bool
    jitter_prob: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale_prob: float
    blur_prob_global1: float
    blur_prob_global2: float
    blur_prob_local: float
    blur_sigma_min_max: tuple[float, float]
    blur_kernel_size: int
    normalize_mean: tuple[float, float, float]
    normalize_std: tuple[float, float, float]


@dataclass(frozen=True)
class StudentConfig:
    """Section ``student``: the backbone (the teacher's is the same, without drop path)."""

    arch: Architecture
    patch_size: int
    drop_path_rate: float
    layerscale: float
    drop_path_uniform: bool
    pretrained_weights: str
    pretrained_pos_embed: bool
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "identity"]
    block_chunks: int
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    num_register_tokens: int
    interpolate_antialias: bool
    interpolate_offset: float
    attention_backend: Literal["sdpa", "flash", "cudnn", "efficient", "math", "xformers"]


@dataclass(frozen=True)
class TeacherConfig:
    """Section ``teacher``: EMA momentum and temperature."""

    momentum_teacher: float
    final_momentum_teacher: float
    warmup_teacher_temp: float
    teacher_temp: float
    warmup_teacher_temp_epochs: float


@dataclass(frozen=True)
class OptimConfig:
    """Section ``optim``: AdamW, its schedules and parameter groups. Epochs are of OFFICIAL_EPOCH_LENGTH steps."""

    epochs: float
    early_stop: float | None
    weight_decay: float
    weight_decay_end: float
    base_lr: float
    warmup_epochs: float
    min_lr: float
    clip_grad: float
    freeze_last_layer_epochs: float
    scaling_rule: Literal["sqrt_wrt_1024", "none"]
    patch_embed_lr_mult: float
    layerwise_decay: float
    adamw_beta1: float
    adamw_beta2: float
    lr: float


@dataclass(frozen=True)
class PerformanceConfig:
    """Section ``performance``: how the step is computed; only FP8 changes results beyond rounding."""

    compile: Switch
    compile_backend: Literal["inductor", "aot_eager", "eager"]
    packed_crops: bool
    inverse_gather: bool
    factored_targets: bool
    prune_last_block: bool
    fused_update: Switch
    weight_copies: bool
    fp8: Literal["none", "teacher", "all"]
    fp8_scaling: Literal["tensor", "row"]
    recompute: Literal["none", "selective", "full"]
    prefetch_blocks: int


@dataclass(frozen=True)
class CropsConfig:
    """Section ``crops``: multi-crop sizes (px) and area scales."""

    global_crops_scale: tuple[float, float]
    local_crops_number: int
    local_crops_scale: tuple[float, float]
    global_crops_size: int
    local_crops_size: int


@dataclass(frozen=True)
class LabelledConfig:
    """One entry of ``evaluation.labelled``: a folder of tiles, and a CSV of labels where folders do not say them."""

    path: str = ""
    name: str = ""
    labels: str = ""


@dataclass(frozen=True)
class EvaluationConfig:
    """Section ``evaluation``: period of export and probes; labelled tiles to probe on."""

    eval_period_iterations: int
    bach_root: str
    breakhis_root: str
    pcam_root: str
    labelled: tuple[LabelledConfig, ...]
    probes: tuple[Probe, ...]
    probe_tiles: int


@dataclass(frozen=True)
class LoggingConfig:
    """Section ``logging``: where and how often metrics are written."""

    period_iterations: int
    samples: bool
    wandb: bool
    wandb_project: str


@dataclass(frozen=True)
class Config:
    """A whole run configuration."""

    MODEL: ModelConfig
    compute_precision: ComputePrecisionConfig
    dino: DinoConfig
    ibot: IbotConfig
    train: TrainConfig
    online: OnlineConfig
    augmentation: AugmentationConfig
    student: StudentConfig
    teacher: TeacherConfig
    optim: OptimConfig
    performance: PerformanceConfig
    crops: CropsConfig
    evaluation: EvaluationConfig
    logging: LoggingConfig


# Keys that older YAML files carry and that decide nothing here; each is accepted with this one-line notice.
INERT_KEYS = {
    "dino.do_kde": "dino.kde_loss_weight > 0 decides",
    "dino.do_koleo": "dino.koleo_loss_weight > 0 decides",
    "train.saveckp_freq": "train.checkpoint_period_iterations decides",
    "train.cache_dataset": "the stream's index is always cached in the output folder",
    "train.dataset_path": "train.streaming_dataset_path or train.sample_list_path names the data",
    "optim.lr": "the learning rate is optim.base_lr under optim.scaling_rule",
    "student.block_chunks": "blocks are never chunked; weights saved in chunks still load",
}
INERT_KEYS |= {
    f"compute_precision.{network}.{module}.mixed_precision.buffer_dtype": "the networks have no buffers"
    for network in ("teacher", "student")
    for module in ("backbone", "dino_head", "ibot_head")
}
INERT_KEYS |= {
    f"compute_precision.teacher.{module}.mixed_precision.reduce_dtype": "the teacher has no gradients to reduce"
    for module in ("backbone", "dino_head", "ibot_head")
}
