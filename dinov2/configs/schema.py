"""The configuration's sections and keys; one frozen dataclass per YAML section.

Each key is stated once, here: type, default, accepted values and meaning. ``python -m dinov2.configs --write`` writes
``ssl_default_config.yaml`` and the tables of ``docs/config.md`` from it. `older_keys` maps the keys of older files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dinov2.configs.fields import key
from dinov2.configs.schedule import NO_RATE_SCHEDULE, NO_SCHEDULE, RateSchedule, Schedule
from dinov2.extensions import BUILT_IN_LOSSES, BUILT_IN_STEPS

AUTO_EPOCHS = 100
"""Epochs of ``optim.epochs: auto``, of equal length: warm-ups, told in epochs, keep their fraction of the run."""

Precision = Literal["bf16", "fp16", "fp32"]
ShardingStrategy = Literal["SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD", "HYBRID_SHARD"]
Auto = Literal["auto"]
Switch = Literal["auto", True, False]
FfnLayer = Literal["mlp", "swiglu", "swiglufused", "identity"]
AttentionBackend = Literal["sdpa", "flash", "cudnn", "efficient", "math", "xformers"]
Range = tuple[float, float]  # lowest and highest
Colour = tuple[float, float, float]  # red, green and blue

_WEIGHT = {"least": 0, "most": 1e6}  # of a loss
_PROBABILITY = {"least": 0, "most": 1}
_EPOCHS = {"least": 0, "most": 1e9}
_STEPS = {"least": 1, "most": 1e12}
_SECONDS = {"least": 0, "most": 1e7}
_SIDE = {"least": 1, "most": 8192}
_TO_1000 = {"least": 0, "most": 1000}
_STRENGTH = {"least": 0, "most": 100}
_KIND = {"registry": "SOURCES", "also": ("auto",)}
_ADDED_LOSSES = {"registry": "LOSSES", "built_in": BUILT_IN_LOSSES}
_ADDED_STEPS = {"registry": "AUGMENTATIONS", "built_in": BUILT_IN_STEPS}
_PROBE = {"registry": "PROBES", "also": ("linear",)}
_PROBES = ("knn", "linear", "rankme", "odcorr")


@dataclass(frozen=True)
class ModelConfig:
    """Starting weights under Meta's name."""

    WEIGHTS: str = key("", "teacher export to start from: backbone, and each head that it holds", is_path=True)


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Dtypes of one module."""

    param_dtype: Precision = key("bf16", "of the matmuls; weights and optimiser state stay fp32")
    reduce_dtype: Precision = key("fp32", "of the gradient sum over processes; no effect in the teacher")


@dataclass(frozen=True)
class ModulePrecisionConfig:
    """Sharding and dtypes of one module (backbone or head)."""

    sharding_strategy: ShardingStrategy = key("SHARD_GRAD_OP", "FULL_SHARD gathers weights again for the backward")
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()


@dataclass(frozen=True)
class NetworkPrecisionConfig:
    """Precision of one network, module by module."""

    backbone: ModulePrecisionConfig = ModulePrecisionConfig()
    dino_head: ModulePrecisionConfig = ModulePrecisionConfig()
    ibot_head: ModulePrecisionConfig = ModulePrecisionConfig()


@dataclass(frozen=True)
class ComputePrecisionConfig:
    """Precision and sharding of each module, where `precision` does not say enough."""

    grad_scaler: bool = key(True, "loss scaling; in effect only where the student computes in fp16")
    teacher: NetworkPrecisionConfig = NetworkPrecisionConfig()
    student: NetworkPrecisionConfig = NetworkPrecisionConfig()


@dataclass(frozen=True)
class DatasetConfig:
    """One entry of ``data.datasets``: a dataset of a mixture and its fraction of the samples."""

    path: str = key("", "as data.path", is_path=True)
    kind: str = key("auto", "as data.kind", **_KIND)
    weight: float = key(1.0, "fraction of the samples, up to a common factor", above=0, most=1e9)
    revision: str = key("", "as data.revision")


@dataclass(frozen=True)
class DataConfig:
    """The tiles that are trained on; see [data.md](data.md)."""

    path: str = key("", "folder, glob, file, hub dataset (org/name) or URL", is_path=True)
    kind: str = key("auto", "one of those in data.md, or a further one; auto: as it is recognised", **_KIND)
    revision: str = key("", "branch, tag or commit on the hub; a resumed run keeps its commit")
    image_column: str = key("", "column of images of Parquet shards, or of paths of a list; dataset of HDF5")
    datasets: tuple[DatasetConfig, ...] = key((), "a mixture in place of path: [{path: a, weight: 3}, {path: b}]")
    options: Mapping[str, Any] = key({}, "options of further kinds: {kind: {...}}", registry="SOURCES")
    groups_file: str = key("", "CSV file,patient,slide,site of tiles in folders, archives and HDF5 files", is_path=True)
    patient_pattern: str = key("", "of their names, with groups as in (?P<patient>..), slide, site")
    exclusion_file: str = key("", "patients or slides, one per line, that are never trained on", is_path=True)
    excluded_sites: tuple[str, ...] = key((), "never trained on, by the column site")
    validation_fraction: float = key(0.0, "of patients, never trained on, chosen by hash", least=0, below=1)
    slide_fraction: float = key(1.0, "of the slides to train on, chosen by hash of seed and name", above=0, most=1)
    max_tiles: int = key(0, "of each dataset, drawn by the seed; 0: all, of slides without end", least=0, most=2**30)
    tile_size: int = key(224, "side in px of a tile read from a slide", least=1, most=16384)
    mpp_file: str = key("", "CSV slide,mpp: um per level-0 px, in place of what slides say", is_path=True)
    mpp_tolerance: float = key(0.2, "fraction by which slides may be coarser than what is asked", least=0, most=1)
    slide_root: str = key("", "where a sample list's slides were moved; empty: as listed", is_path=True)
    sample_list_columns: Literal[0, 4, 6] = key(0, "of a sample list; 0: as its .meta.json says, else 4")
    lanes: int = key(0, "V, interleaved read streams; 0: 8 x global batch or fewer", least=0, most=1e8)
    block_rows: int = key(64, "R, rows shuffled together inside a row group", least=1, most=1e8)
    memory_gib: float = key(16.0, "most that the reader of one process may hold", above=0, most=1e6)
    outage_minutes: float = key(30.0, "that a server may fail to answer before training stops", least=0, most=1e5)
    max_corrupt_fraction: float = key(0.001, "of undecodable rows; training stops above it", **_PROBABILITY)


@dataclass(frozen=True)
class OnlineConfig:
    """Tiles cut from slides at random positions while training (``data.kind: slides``)."""

    weight_column: str = key("", "column of a CSV of slides by which they are drawn; empty: all alike")
    mpp: tuple[float, ...] = key((0.25, 0.5, 1.0, 2.0), "um per px of the tiles", above=0, most=1e4)
    mpp_weights: tuple[float, ...] = key((), "how often each is drawn; empty: all alike", above=0, most=1e9)
    magnifications: tuple[float, ...] = key((), "in place of mpp: 10 / magnification", above=0, most=1e4)
    min_foreground: float = key(0.4, "least fraction of tissue in a tile", **_PROBABILITY)
    tissue: str = key("hsv", "which pixels are tissue", registry="TISSUE_RULES")
    tissue_options: Mapping[str, Any] = key({}, "options of these rules: {name: {...}}", registry="TISSUE_RULES")
    cache_dir: str = key("", "of tissue masks and tile indexes; empty: in the run's folder", is_path=True)


@dataclass(frozen=True)
class TrainConfig:
    """Batch, steps, checkpoints."""

    batch_size_per_gpu: int | Auto = key(64, "images per process at once; auto: what the GPU holds", least=1, most=1e6)
    output_dir: str = key(".", "the run's folder where --output-dir is not given", is_path=True)
    seed: int = key(0, "of everything random", least=0, most=2**64 - 1)
    num_workers: int = key(10, "decode processes per training process; 0: none", least=0, most=1024)
    prefetch_factor: int = key(4, "batches that each worker prepares ahead", least=1, most=1024)
    OFFICIAL_EPOCH_LENGTH: int = key(1250, "steps per epoch of the schedules; not with epochs: auto", least=1, most=1e9)
    centering: Literal["centering", "sinkhorn_knopp"] = key("centering", "teacher targets; centering: running mean")
    use_pretrained: bool = key(False, "start from Meta's published DINOv2 weights of this architecture")
    unfreeze_last_n_blocks: int = key(0, "n > 0: only the last n blocks, final norm and heads learn", **_TO_1000)
    skip_checkpointer: bool | None = key(False, "true: no checkpoints, so no resume")
    checkpoint_period_iterations: int = key(1250, "steps between checkpoints; one more at the end", **_STEPS)
    hang_timeout: float = key(600.0, "seconds that a step, or waiting for data, may take; 0: any", **_SECONDS)
    start_timeout: float = key(3600.0, "the same for a start with its first step, saving and exporting", **_SECONDS)
    allow_changes: bool = key(False, "resume a run with other values of what defines it")
    time_limit: float = key(0.0, "hours after which a run saves a checkpoint and stops; 0: none", least=0, most=1e6)
    keep_checkpoints: int = key(2, "newest complete checkpoints kept", least=1, most=1e6)
    keep_checkpoints_every: int = key(
        0, "kept beside: those of steps that are multiples of it; 0: none", least=0, most=1e12
    )
    on_collapse: Literal["warn", "stop"] = key("warn", "stop: ends the run, without a checkpoint of what has collapsed")
    async_checkpoints: bool = key(True, "written while training goes on, from a copy in host memory")


@dataclass(frozen=True)
class HeadConfig:
    """Layers of a projection head."""

    head_n_prototypes: int = key(65536, "prototypes, the head's outputs", least=1, most=2**22)
    head_bottleneck_dim: int = key(256, "width before the prototypes", least=1, most=2**14)
    head_nlayers: int = key(3, "layers of the head's MLP", least=1, most=32)
    head_hidden_dim: int = key(2048, "width of its hidden layers", least=1, most=2**14)


@dataclass(frozen=True)
class DinoConfig(HeadConfig):
    """The CLS-token loss, its head, and the regularisers of the CLS token."""

    loss_weight: float = key(1.0, "of the CLS-token cross-entropies, local and global", **_WEIGHT)
    koleo_loss_weight: float = key(0.1, "of KoLeo, summed over the global views; 0: off", **_WEIGHT)
    koleo_gather: bool = key(False, "true: nearest neighbours among the rows of all processes")
    koleo_topk: int = key(1, "nearest neighbours of each that KoLeo counts", least=1, most=1024)
    koleo_group: int = key(0, "consecutive images among which they are sought; 0: all", least=0, most=1e6)
    local_loss_weight_schedule: Schedule = NO_SCHEDULE  # a further factor of the local cross-entropy
    kde_loss_weight: float = key(0.0, "of KDE, summed over the global views; 0: off", **_WEIGHT)
    kde_kappa: float = key(5.0, "concentration of the KDE kernel", above=0, most=1e4)
    kde_gather: bool = key(False, "true: density over the rows of all processes")
    kde_ramp_epochs: Range = key((0.0, 0.0), "its weight rises linearly from 0 between these epochs", **_EPOCHS)
    kde_reference_sign: bool = key(False, "true: sign and self term of the published code, which reward collapse")


@dataclass(frozen=True)
class IbotConfig(HeadConfig):
    """The masked-patch loss, its masks and its head."""

    loss_weight: float = key(1.0, "of the masked-patch cross-entropy", **_WEIGHT)
    mask_sample_probability: float = key(0.5, "of global crops masked, a multiple of 0.25", **_PROBABILITY)
    mask_ratio_min_max: Range = key((0.1, 0.5), "masked fraction of such a crop's patches", **_PROBABILITY)
    separate_head: bool = key(False, "true: patches have a head of their own; false: the DINO head serves both")


@dataclass(frozen=True)
class CropsConfig:
    """Multi-crop sizes and scales."""

    global_crops_scale: Range = key((0.32, 1.0), "range of a global view's fraction of the tile", above=0, most=1)
    local_crops_number: int = key(8, "local views per image", least=0, most=256)
    local_crops_scale: Range = key((0.05, 0.32), "range of a local view's fraction of the tile", above=0, most=1)
    global_crops_size: int = key(224, "side of a global view in px, a multiple of the patch", **_SIDE)
    local_crops_size: int = key(98, "side of a local view in px, a multiple of the patch", **_SIDE)
    max_aspect_ratio: float = key(4 / 3, "x: a view's width / height in the tile is in [1/x, x]", least=1, most=100)
    localcrops_subset_of_globalcrops: bool = key(
        False, "true: local views are windows of the global views, at whole patches, not resized"
    )
    gram_teacher_crops_size: int | None = key(
        None, "side of the gram teacher's view of the same box; null: it sees the global views", **_SIDE
    )
    gram_teacher_no_distortions: bool = key(
        False, "true: its views are only flipped and turned; false: the global views"
    )

    @property
    def gram_views_size(self) -> int | None:
        """Side of the gram teacher's own views; None where it sees the global ones."""
        return self.gram_teacher_crops_size if self.gram_teacher_no_distortions else None


@dataclass(frozen=True)
class AugmentationConfig:
    """Steps after the crop, in this order; a probability is that of the step happening."""

    horizontal_flip_prob: float = key(0.5, "left-right mirror", **_PROBABILITY)
    vertical_flip_prob: float = key(0.0, "up-down mirror", **_PROBABILITY)
    hed_prob: float = key(0.5, "stain perturbation", **_PROBABILITY)
    hed_shift: float = key(0.05, "each stain shifted by U(-x, x), in scikit-image's HED units", **_STRENGTH)
    hed_scale: float = key(0.0, "each stain first multiplied by U(1 - x, 1 + x)", **_STRENGTH)
    hed_clip: bool = key(True, "stain amounts clipped to [0, 1] after the shift, as published")
    hed_per_tile: bool = key(False, "true: all views of a tile are perturbed alike; false: each by itself")
    jitter_prob: float = key(0.8, "the four colour adjustments below, in random order", **_PROBABILITY)
    brightness: float = key(0.2, "factor U(1 - x, 1 + x)", **_STRENGTH)
    contrast: float = key(0.2, "factor U(1 - x, 1 + x)", **_STRENGTH)
    saturation: float = key(0.1, "factor U(1 - x, 1 + x)", **_STRENGTH)
    hue: float = key(0.05, "turn U(-x, x) of the colour circle", least=0, most=0.5)
    jitter_per_tile: bool = key(False, "true: all views of a tile are adjusted, and greyed, alike")
    grayscale_prob: float = key(0.2, "the colours dropped", **_PROBABILITY)
    blur_prob_global1: float = key(1.0, "blur of the first global view", **_PROBABILITY)
    blur_prob_global2: float = key(0.1, "blur of the second global view", **_PROBABILITY)
    blur_prob_local: float = key(0.5, "blur of each local view", **_PROBABILITY)
    blur_sigma_min_max: Range = key((0.1, 2.0), "range of the blur's sigma in px", above=0, most=1000)
    blur_kernel_size: int = key(9, "odd width of the blur's kernel in px", least=1, most=1023)
    normalize_mean: Colour = key((0.485, 0.456, 0.406), "per channel, of values in [0, 1]", least=-100, most=100)
    normalize_std: Colour = key((0.229, 0.224, 0.225), "per channel", above=0, most=100)
    steps: Mapping[str, Any] = key({}, "further steps, such as {rotate90: {prob: 0.75}}", **_ADDED_STEPS)


@dataclass(frozen=True)
class StudentConfig:
    """The backbone; the teacher's is the same, without stochastic depth."""

    arch: str = key(
        "vit_large",
        "vit_demo, vit_shallow, vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant2; dinov3_vits16, ...",
        registry="BACKBONES",
    )
    options: Mapping[str, Any] = key(
        {}, "further arguments of the backbone, which win over other keys, such as {depth: 24}"
    )
    patch_size: int = key(14, "side of a patch in px", least=1, most=1024)
    drop_path_rate: float = key(0.3, "stochastic depth of the student", least=0, below=1)
    layerscale: float = key(1.0e-05, "initial gain of each residual branch", **_TO_1000)
    drop_path_uniform: bool = key(True, "false: the rate grows linearly from 0 in the first block")
    pretrained_weights: str = key(
        "", "backbone weights to start from: file, folder, hub id (org/name) or URL", is_path=True
    )
    pretrained_pos_embed: bool = key(True, "take the position grid of weights to start from; false: noise")
    ffn_layer: FfnLayer = key("mlp", "swiglufused: two thirds as wide, as published")
    qkv_bias: bool = key(True, "bias of queries, keys and values")
    proj_bias: bool = key(True, "bias of the attention's output")
    ffn_bias: bool = key(True, "biases of the FFN")
    num_register_tokens: int = key(0, "registers after the CLS token", least=0, most=1024)
    interpolate_antialias: bool = key(True, "antialias where the position grid is resized to a crop")
    interpolate_offset: float = key(0.0, "added to the target grid's side; older DINOv2 code: 0.1", least=-10, most=10)
    attention_backend: AttentionBackend = key("sdpa", "sdpa: PyTorch's choice")


@dataclass(frozen=True)
class TeacherConfig:
    """EMA momentum and temperature."""

    momentum_teacher: float = key(0.992, "EMA momentum at the start of its cosine", **_PROBABILITY)
    final_momentum_teacher: float = key(1.0, "EMA momentum at the end", **_PROBABILITY)
    warmup_teacher_temp: float = key(0.04, "temperature at the start", above=0, most=100)
    teacher_temp: float = key(0.07, "temperature after the warm-up", above=0, most=100)
    warmup_teacher_temp_epochs: float = key(30.0, "length of that linear warm-up", **_EPOCHS)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedules and parameter groups. Epochs are of ``train.OFFICIAL_EPOCH_LENGTH`` steps."""

    epochs: float | Auto = key(
        100.0, "span of the schedules and of training; auto: 100, by the number of tiles", above=0, most=1e9
    )
    early_stop: float | None = key(None, "training ends here, same schedules; null: optim.epochs", above=0, most=1e9)
    max_flops: float | None = key(
        None, "model arithmetic of the run at most: epochs shrink, their number stays; null: any", above=0, most=1e30
    )
    weight_decay: float = key(0.04, "at the start of its cosine", **_TO_1000)
    weight_decay_end: float = key(0.4, "at the end", **_TO_1000)
    base_lr: float = key(0.004, "peak learning rate at a global batch of 1024", above=0, most=1000)
    warmup_epochs: float = key(10.0, "linear warm-up of the learning rate from 0", **_EPOCHS)
    min_lr: float = key(1.0e-06, "learning rate at the end of its cosine", **_TO_1000)
    clip_grad: float = key(3.0, "largest gradient norm, backbone and each head; 0: off", least=0, most=1e9)
    freeze_last_layer_epochs: float = key(1.0, "in which the heads' last layers do not learn", **_EPOCHS)
    scaling_rule: Literal["sqrt_wrt_1024", "four_sqrt_wrt_1024", "none"] = key(
        "sqrt_wrt_1024", "peak = base_lr x sqrt(global batch / 1024); four: 4 times that, as DINOv3; none: base_lr"
    )
    patch_embed_lr_mult: float = key(0.2, "learning-rate factor of the patch embedding", **_TO_1000)
    layerwise_decay: float = key(0.9, "learning-rate factor per layer below the top; 1: none", above=0, most=10)
    adamw_beta1: float = key(0.9, "decay of the first moment", least=0, below=1)
    adamw_beta2: float = key(0.999, "decay of the second moment", least=0, below=1)
    accumulation_steps: int = key(
        1, "micro-batches of batch_size_per_gpu per step; Sinkhorn, KDE and KoLeo see one at a time", least=1, most=1e6
    )


@dataclass(frozen=True)
class SchedulesConfig:
    """DINOv3's section: each schedule that is given takes the place of its keys in ``optim`` and ``teacher``."""

    lr: RateSchedule = NO_RATE_SCHEDULE
    weight_decay: Schedule = NO_SCHEDULE
    momentum: Schedule = NO_SCHEDULE
    teacher_temp: Schedule = NO_SCHEDULE

    def __post_init__(self) -> None:
        if self.momentum.is_given and max(self.momentum.values()) > 1:
            raise ValueError(f"momentum has the values {self.momentum.values()}; at most 1 is expected")
        if self.teacher_temp.is_given and min(self.teacher_temp.values()) <= 0:
            raise ValueError(f"teacher_temp has the values {self.teacher_temp.values()}; more than 0 is expected")


@dataclass(frozen=True)
class PerformanceConfig:
    """Computation of a step; only ``fp8`` changes results beyond rounding. See [performance.md](performance.md)."""

    compile: Switch = key("auto", "blocks and losses by torch.compile; auto: on a GPU with Triton")
    fused_update: Switch = key("auto", "clip, AdamW, EMA, copies in one Triton pass; auto: on a GPU")
    fp8: Literal["none", "teacher", "all"] = key("none", "matmuls of the blocks in 8 bit")
    fp8_scaling: Literal["tensor", "row"] = key("tensor", "what shares one scale; tensor is fastest")
    recompute: Literal["none", "selective", "full"] = key("none", "selective: all but matmuls and attention")
    prefetch_blocks: int = key(1, "blocks gathered ahead by several processes; 0: FSDP's choice", **_TO_1000)


@dataclass(frozen=True)
class DebugConfig:
    """Switches that only serve to trace a wrong or slow step to its cause; each can be turned off alone."""

    packed_crops: bool = key(True, "all crop sizes as one matrix; false: one pass per size")
    inverse_gather: bool = key(True, "rows of stochastic depth addressed both ways; false: index_add")
    factored_targets: bool = key(True, "Sinkhorn's targets as two scaling vectors; false: written out")
    prune_last_block: bool = key(True, "last block only for the tokens that a loss reads")
    weight_copies: bool = key(True, "one process: 16-bit copies of weights; false: cast at each use")
    compile_backend: Literal["inductor", "aot_eager", "eager"] = key(
        "inductor", "the others show whether tracing or kernels err"
    )


@dataclass(frozen=True)
class LabelledConfig:
    """One entry of ``evaluation.labelled``: a folder of tiles, and a CSV of labels where folders do not say them."""

    path: str = key("", "folder of tiles", is_path=True)
    name: str = key("", "of the task; empty: the folder's")
    labels: str = key("", "CSV of labels; empty: the subfolders are the classes", is_path=True)


@dataclass(frozen=True)
class EvaluationConfig:
    """Export of the teacher and its probes, see [probes.md](probes.md)."""

    eval_period_iterations: int = key(12500, "between teacher exports and between probes", **_STEPS)
    keep_exports: int = key(0, "newest teacher exports kept of those that the run made; 0: all", least=0, most=1e6)
    bach_root: str = key("", "this benchmark's folder: probed on while training", is_path=True)
    breakhis_root: str = key("", "the same for BreakHis", is_path=True)
    pcam_root: str = key("", "the same for PatchCamelyon", is_path=True)
    labelled: tuple[LabelledConfig, ...] = key((), "further tiles: [{path: tiles/, name: subtype, labels: labels.csv}]")
    probes: tuple[str, ...] = key(
        _PROBES, "of knn, linear, linear_eva, linear_kaiko, logistic, few_shot, rankme, odcorr", **_PROBE
    )
    probe_options: Mapping[str, Any] = key({}, "options of probes: {name: {...}}", registry="PROBES")
    probe_tiles: int = key(2000, "tiles of each split that are used, at most", least=1, most=1e9)


@dataclass(frozen=True)
class LoggingConfig:
    """Sinks of metrics, and how often they are written."""

    period_iterations: int = key(10, "steps per record of console, metrics.jsonl and sinks", **_STEPS)
    samples: bool = key(False, "true: logs/samples.rankN.jsonl says which samples each step consumed")
    wandb: bool = key(True, "Weights & Biases; offline unless logged in; never prompts")
    wandb_project: str = key("path-fm", "its project")
    sinks: tuple[str, ...] = key((), "further ones: [tensorboard, mlflow]", registry="SINKS")
    pictures: bool = key(True, "W&B, TensorBoard and MLflow get crops and maps of patch features at each export")
    upload_teacher: bool = key(False, "true: W&B and MLflow keep each exported teacher, too")


@dataclass(frozen=True)
class Config:
    """A whole run configuration."""

    MODEL: ModelConfig = ModelConfig()
    precision: Literal["bf16", "fp16", "fp32", "mixed"] = key(
        "bf16", "of all matmuls; mixed: as compute_precision says"
    )
    compute_precision: ComputePrecisionConfig = ComputePrecisionConfig()
    data: DataConfig = DataConfig()
    online: OnlineConfig = OnlineConfig()
    train: TrainConfig = TrainConfig()
    dino: DinoConfig = DinoConfig()
    ibot: IbotConfig = IbotConfig()
    losses: Mapping[str, Any] = key({}, "further losses: {name: {weight: 0.1, ...}}", **_ADDED_LOSSES)
    crops: CropsConfig = CropsConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    performance: PerformanceConfig = PerformanceConfig()
    debug: DebugConfig = DebugConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
