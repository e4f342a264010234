"""Whatever is written in a configuration is answered by sentences, soon and briefly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dinov2.configs import ConfigError, load_config, validate

DATA = "data.path=shards"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


def faults(file: Path | None, *overrides: str) -> list[str]:
    """Faults of a configuration, which are few words each and come at once: none may hang."""
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        validate(load_config(file, [DATA, *overrides]), world_size=8)
    assert time.process_time() - start < 10
    assert all(len(fault) < 600 and fault.endswith((".", "?")) for fault in caught.value.faults)
    return caught.value.faults


@pytest.mark.parametrize(
    "override",
    [
        "dino.head_nlayers=1000000",
        "dino.head_nlayers=0",
        "ibot.head_n_prototypes=1000000000000",
        "dino.head_bottleneck_dim=1e9",
        "ibot.head_hidden_dim=-1",
        "crops.local_crops_number=1000000000",
        "crops.local_crops_number=1e9",
        "crops.global_crops_size=1000000006",
        "crops.local_crops_scale=[0.0,0.5]",
        "crops.local_crops_scale=[1e300,1e308]",
        "optim.epochs=1e300",
        "optim.early_stop=-1",
        "optim.early_stop=1e-300",
        "optim.warmup_epochs=1e300",
        "optim.base_lr=1e300",
        "optim.clip_grad=-1",
        "optim.adamw_beta2=1",
        "train.OFFICIAL_EPOCH_LENGTH=100000000000000000000000000000000",
        "train.OFFICIAL_EPOCH_LENGTH=1000000000",
        "train.num_workers=1000000",
        "train.prefetch_factor=1000000000",
        "train.batch_size_per_gpu=1000000000000",
        "train.keep_checkpoints=0",
        "train.keep_checkpoints_every=-1",
        "train.async_checkpoints=1",
        "evaluation.keep_exports=-1",
        "train.seed=-1",
        f"train.seed={2**64}",
        f"train.seed={10**400}",
        f"train.seed={'9' * 5000}",
        "train.unfreeze_last_n_blocks=1000000000",
        "data.tile_size=1000000",
        "data.lanes=1000000000000",
        "data.block_rows=0",
        "data.memory_gib=1e300",
        "data.outage_minutes=1000000000",
        "data.validation_fraction=1",
        "data.max_corrupt_fraction=1.1",
        "online.max_patches=1000000000000",
        "data.max_tiles=1000000000000",
        "data.slide_fraction=0",
        "online.mpp=[1e-300,-1]",
        "online.mpp=[]",
        "online.mpp_weights=[0,0,0,0]",
        "student.num_register_tokens=1000000000",
        "student.patch_size=1000000000",
        "student.layerscale=1e300",
        "student.drop_path_rate=1.0",
        "student.interpolate_offset=1e300",
        "student.arch=vit_enormous",
        "ibot.mask_ratio_min_max=[0.1,1e9]",
        "ibot.mask_ratio_min_max=[.nan,0.5]",
        "ibot.mask_sample_probability=.inf",
        "teacher.teacher_temp=0",
        "teacher.momentum_teacher=1.5",
        "augmentation.blur_kernel_size=1000001",
        "augmentation.blur_sigma_min_max=[0,1]",
        "augmentation.brightness=1e300",
        "augmentation.normalize_std=[1,1,0]",
        "dino.loss_weight=-.inf",
        "dino.kde_kappa=1e300",
        "logging.period_iterations=0",
        "evaluation.probe_tiles=-5",
        "performance.prefetch_blocks=1000000000",
        "performance.compile=[auto]",
        "precision=fp64",
        "precision=[fp32]",
        "crops=[1,2]",
        "crops=",
        "data.datasets=5",
        "data.datasets.0.path=x",
        "data.datasets=[5]",
        "data.datasets=[{path: a, path: b}]",
        "data.datasets=[{path: a, weight: 0}]",
        "data.datasets=[{path: a, kind: parket}]",
        "data.kind=folder",
        "train.seed.x=1",
        "train.seed.x.y.z=1",
        "a.b.c=1",
        ".seed=1",
        "train.=1",
        "train..seed=1",
        "=1",
        "",
        "train.seed",
        ".".join(["a"] * 5000) + "=1",
        "x" * 5000 + "=1",
        "train.output_dir=" + "[" * 100 + "]" * 100,
        "train.output_dir=" + "[" * 100_000,
        "train.seed=" + "{a: " * 100 + "1" + "}" * 100,
        "train.seed=" + "x" * 100_000,
        "data.datasets=[" + "{path: a}," * 30_000 + "]",
        "train.seed=*a",
        "train.seed=&a [*a]",
        "train.seed=!!python/object/apply:os.system [x]",
        "train.seed=!!set {a, b}",
        "train.seed=2020-01-01",
        "train.output_dir=${train.output_dir}",
        "losses.nothing.weight=1",
        "losses.koleo.weight=1",
        "losses=[a]",
        "augmentation.steps={blur: {}}",
        "augmentation.steps={blurr: {}}",
        "evaluation.probes=knn",
        "evaluation.labelled=[{}]",
        "student.options=[]",
        "compute_precision.student=fp16",
        "compute_precision.student.backbone.mixed_precission.param_dtype=fp16",
    ],
)
def test_one_value(override: str):
    if override == "crops=":  # a section with nothing under it keeps its defaults
        validate(load_config(None, [DATA, override]), world_size=8)
    else:
        assert len(faults(None, override)) in (1, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {seed: 1, seed: 2}\noptim: {}\noptim: {epochs: 3}\n", ("seed", "line 1 and 1", "line 2 and 3")),
        ("crops: [1, 2]\n", ("crops = [1, 2] is not a section",)),
        ("train:\n  seed:\n    x: 1\n", ("train.seed.x",)),
        ("".join(f"{' ' * n}a:\n" for n in range(100)), ("nested more than 32 deep", "line 32")),
        (BOMB, ("holds more than 20,000 values",)),
        ("a: &a {b: *a}\n", ("an alias refers to what it stands in",)),
        ("[1, 2]\n", ("holds a list",)),
        ("word\n", ("holds the value 'word'",)),
        ("1: 2\nnull: 4\n", ("key 1;", "key None;")),
        ("? [a, b]\n: 1\n", ("unhashable key",)),
        ("train:\n\tseed: 1\n", ("line 2, column 1",)),
        ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", ("another document",)),
        ("x" * 200_000, ("200,000 characters",)),
        ("train: {seed: *b}\n", ("undefined alias",)),
    ],
)  # fmt: skip
def test_files(tmp_path: Path, text: str, words: tuple[str, ...]):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    said = "\n".join(faults(file))
    assert all(word in said for word in words), said


def test_what_aliases_and_comments_of_published_files_mean_is_kept(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("ibot: &head {head_n_prototypes: 131072}\ndino:\n  <<: *head\n  loss_weight: 1e-1\n")
    config = load_config(file)
    assert (config.dino.head_n_prototypes, config.dino.loss_weight) == (131072, 0.1)
    file.write_text("")
    assert load_config(file) == load_config(None)


def test_numbers_as_people_write_them():
    config = load_config(None, ["optim.base_lr=1e-4", "optim.min_lr=1.e-6", "optim.weight_decay=.5", "train.seed=1_000",
                                "train.output_dir=2020-01-01", "optim.epochs=+3",
                                "optim.weight_decay_end=1E+2"])  # fmt: skip
    optim = config.optim
    assert (optim.base_lr, optim.min_lr, optim.weight_decay, optim.epochs) == (1e-4, 1e-6, 0.5, 3.0)
    assert (config.train.seed, config.train.output_dir, optim.weight_decay_end) == (1000, "2020-01-01", 100.0)
