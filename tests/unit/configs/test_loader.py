"""The strict configuration loader: merge order, faults, inert keys, saved file."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path

import pytest
import yaml

import dinov2
from dinov2 import extensions
from dinov2.configs import Config, ConfigError, config_from_mapping, load_config, recipes, save_config, validate
from dinov2.configs.decode import keys_of
from dinov2.configs.fields import Key, key
from dinov2.utils.registry import Registry

PACKAGE = Path(dinov2.__file__).parent
SHIPPED = sorted((PACKAGE / "configs" / "train").glob("*.yaml"))
DATA = "data.path=shards"


def test_merge_order(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {base_lr: 1e-4, epochs: 7}\n")
    config = load_config(file, ["optim.epochs=9", "crops.local_crops_scale=[0.1,0.3]"])
    assert (config.optim.base_lr, config.optim.epochs) == (1e-4, 9.0)
    assert config.optim.weight_decay == 0.04  # default
    assert config.crops.local_crops_scale == (0.1, 0.3)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_yaml_loads_and_is_valid(path: Path):
    validate(load_config(path), world_size=8)


def test_recipe_numbers():
    config = load_config(PACKAGE / "configs/train/vitg14_reg4.yaml")
    assert (config.optim.base_lr, config.optim.epochs, config.optim.early_stop) == (2e-4, 8000, 200)
    assert (config.train.batch_size_per_gpu, config.student.drop_path_rate, config.optim.clip_grad) == (
        48,
        0.4,
        3.0,
    )
    assert (config.dino.head_n_prototypes, config.dino.head_bottleneck_dim, config.ibot.head_bottleneck_dim) == (
        131072, 384, 256)  # fmt: skip
    assert config.ibot.mask_ratio_min_max == (0.1, 0.45)
    assert (config.crops.global_crops_size, config.crops.local_crops_size) == (224, 98)
    blur = config.augmentation
    assert (blur.blur_prob_global1, blur.blur_prob_global2, blur.blur_prob_local) == (1.0, 0.1, 0.5)
    assert not config.dino.kde_reference_sign


def test_published_yaml_works_as_it_stands(tmp_path: Path):
    """Keys of the OpenMidnight vits14 recipe, the ones that were never read included."""
    file = tmp_path / "published.yaml"
    file.write_text(
        "dino: {head_n_prototypes: 131072, head_bottleneck_dim: 384, do_kde: True, kde_loss_weight: .05,"
        " koleo_loss_weight: 0, do_koleo: False}\n"
        "ibot: {loss_weight: 1.0, mask_sample_probability: 0.5, mask_ratio_min_max: [0.1, 0.45],"
        " separate_head: true, head_n_prototypes: 131072}\n"
        "train: {sample_list_path: a.txt, streaming_from_hf: false, streaming_dataset_path: medarc/TCGA-12K-parquet,"
        " batch_size_per_gpu: 48, centering: sinkhorn_knopp, use_pretrained: True, OFFICIAL_EPOCH_LENGTH: 1250,"
        " num_workers: 24, prefetch_factor: 8, skip_checkpointer: true}\n"
        "student: {arch: vit_small, patch_size: 14, drop_path_rate: 0.1, ffn_layer: swiglufused, block_chunks: 4,"
        " num_register_tokens: 4, interpolate_antialias: true, interpolate_offset: 0.0}\n"
        "teacher: {momentum_teacher: 0.994}\n"
        "optim: {epochs: 110, early_stop: 110, weight_decay_end: 0.2, base_lr: 7.0e-04, warmup_epochs: 10,"
        " layerwise_decay: 1.0}\n"
        "crops: {local_crops_size: 98}\n"
        "evaluation: {eval_period_iterations: 2500, bach_root: /b, breakhis_root: /h, pcam_root: /p}\n"
    )
    validate(load_config(file), world_size=1)


def test_every_fault_is_reported_at_once_with_path_and_nearest_key(tmp_path: Path):
    overrides = ["train.batch_sie_per_gpu=4", "optim.base_lr=fast", "crops=3", "train.num_workers=2.5",
                 "ibot.mask_ratio_min_max=[0.1]", "train.use_pretrained=1", "nonsense=1"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_config(None, [DATA, *overrides])
    text = str(caught.value)
    assert len(caught.value.faults) == 7
    assert "train.batch_sie_per_gpu; did you mean train.batch_size_per_gpu?" in text
    for fault in ("optim.base_lr = 'fast'", "crops = 3", "train.num_workers = 2.5", "ibot.mask_ratio_min_max = [0.1]",
                  "train.use_pretrained = 1", "Unknown config key nonsense"):  # fmt: skip
        assert fault in text


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_yaml_mapping(tmp_path: Path, content: str):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_malformed_override():
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_config(None, ["--fast"])


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999"])
def test_numbers_are_finite(value: str):
    with pytest.raises(ConfigError, match=r"optim.base_lr = (nan|inf) is not valid; expected a number"):
        load_config(None, [f"optim.base_lr={value}"])


def test_empty_section_keeps_defaults():
    assert config_from_mapping({"optim": None}) == config_from_mapping({})


def test_saved_file_is_what_was_merged(tmp_path: Path):
    config = load_config(SHIPPED[0], ["optim.early_stop=null"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optim"]["base_lr"] == config.optim.base_lr


def test_inert_keys_are_announced(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="dinov2"):
        load_config(None, ["dino.do_kde=true"])
    assert "dino.do_kde has no effect: dino.kde_loss_weight > 0 decides" in caplog.text


@pytest.mark.parametrize("key", [path for path, *_ in keys_of(Config())])
def test_every_key_is_read_somewhere(key: str):
    """Its name is read as an attribute, or mirrored by a field's name, outside the configuration's own handling."""
    name = key.rsplit(".", 1)[-1]
    name = "blur_prob_" if name.startswith("blur_prob_") else name  # of a view, whose name is put in
    pattern = rf"\b{name}" if key.startswith(("augmentation.", "crops.")) else rf"\.{name}\b|\"{name}\""
    sources = (path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts or path.name == "schedule.py")
    assert key == "precision" or any(re.search(pattern, path.read_text()) for path in sources), key


def test_precision_is_written_out_for_every_module_and_single_ones_win():
    one = "compute_precision.student.dino_head.mixed_precision.param_dtype"
    config = config_from_mapping({"precision": "fp32"})
    assert config == load_config(None, ["precision=fp32"])
    assert config.compute_precision.teacher.ibot_head.mixed_precision.param_dtype == "fp32"
    mixed = load_config(None, [f"{one}=bf16", "precision=fp32", f"{one}=fp16"])
    assert mixed.compute_precision.student.dino_head.mixed_precision.param_dtype == "fp16"
    assert (mixed.compute_precision.student.backbone.mixed_precision.param_dtype, mixed.precision) == (
        "fp32",
        "mixed",
    )
    head = {"mixed_precision": {"param_dtype": "bf16"}}
    both = config_from_mapping({"precision": "fp32", "compute_precision": {"teacher": {"dino_head": head}}})
    assert both.compute_precision.teacher.dino_head.mixed_precision.param_dtype == "bf16"
    assert load_config(None, [f"{one}=bf16", "precision=fp16"]).precision == "fp16"


def test_faults_of_every_kind_are_reported_together():
    """A wrong crop size is not hidden by a misspelt key; what depends on a faulty value is not judged."""
    overrides = ["train.batch_sie_per_gpu=4", "optim.base_lr=-1", "crops.local_crops_size=97", "student.patch_size=x",
                 "crops.global_crops_size=210", "ibot.mask_sample_probability=0.3", "train.use_pretrained=maybe",
                 "MODEL.WEIGHTS=a.pth"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_config(None, [DATA, *overrides])
    named = [fault.split(" ")[0] for fault in caught.value.faults]
    assert sorted(named) == ["Unknown", "ibot.mask_sample_probability", "optim.base_lr", "student.patch_size",
                             "train.use_pretrained"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.pth=a", "crops.local_crops_size=97"])
    assert [fault.split(" ")[0] for fault in caught.value.faults] == ["Unknown", "crops.local_crops_size"]
    with pytest.raises(ConfigError) as caught:  # the misspelt key stands beside the one that it looks like
        load_config(None, [DATA, "crops.global_crop_size=98", "crops.global_crops_size=100"])
    assert [fault.split(" ")[0] for fault in caught.value.faults] == ["Unknown", "crops.global_crops_size"]


def test_interpolation(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("train: {output_dir: 'runs/${student.arch}'}\nstudent: {arch: vit_small}\n")
    assert load_config(tmp_path / "run.yaml").train.output_dir == "runs/vit_small"
    with pytest.raises(ConfigError):
        load_config(tmp_path / "run.yaml", ["train.output_dir=${nothing.there}"])


@dataclass(frozen=True)
class Gram:
    @dataclass(frozen=True)
    class Options:
        weight: float = key(0.1, "of the term", least=0, most=10)
        layers: tuple[int, ...] = key((3, 7), "blocks", least=0)


class Bare:
    pass


class Strict:
    @dataclass(frozen=True)
    class Options:
        name: str = dataclass_field(metadata={"key": Key("of something")})
        weight: float = key(1.0, "of the term", least=0)

        def __post_init__(self) -> None:
            if self.name == "bad":
                raise ValueError("bad is no name.")


def test_options_of_registered_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    parts = {"gram": f"{__name__}:Gram", "bare": f"{__name__}:Bare", "gone": "no.such.module:Loss",
             "strict": f"{__name__}:Strict"}  # fmt: skip
    monkeypatch.setattr(extensions, "LOSSES", Registry("loss", parts))
    config = load_config(None, [DATA, "losses.gram.weight=1", "losses.bare="])
    assert config.losses == {"gram": Gram.Options(1.0, (3, 7)), "bare": {}} or config.losses["gram"].weight == 1.0
    validate(config, 1)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    wrong = [
        "losses.gram.weight=11",
        "losses.gram.wieght=1",
        "losses.gramm.weight=1",
        "losses.bare.x=1",
        "losses.gone=",
        "losses.strict.weight=2",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [DATA, *wrong])
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 6
    for words in ("losses.gram.weight = 11 is out of range", "did you mean losses.gram.weight?", "did you mean gram?",
                  "Unknown config key losses.bare.x", "losses.gone cannot be used: No module named"):  # fmt: skip
        assert words in faults
    with pytest.raises(ConfigError, match=r"losses.strict cannot be used: bad is no name\.$"):
        load_config(None, [DATA, "losses.strict.name=bad"])
    assert load_config(None, [DATA, "losses.strict.name=good"]).losses["strict"].weight == 1.0


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = [
        "data.path", "data.mpp_file", "data.slide_root", "data.groups_file", "data.exclusion_file", "online.cache_dir",
        "train.output_dir", "student.pretrained_weights", "MODEL.WEIGHTS", "evaluation.bach_root",
    ]  # fmt: skip
    config = load_config(None, [f"{path}=~/x" for path in keys] + ["evaluation.labelled=[{path: ~/x, labels: ~/y}]"])
    found = [getattr(getattr(config, section), name) for section, name in (path.split(".") for path in keys)]
    assert found == ["/home/me/x"] * len(keys)
    (labelled,) = config.evaluation.labelled
    assert (labelled.path, labelled.labels) == ("/home/me/x", "/home/me/y")
    mixture = load_config(None, ["data.datasets=[{path: ~/x}, {path: org/name}]"]).data.datasets
    assert [dataset.path for dataset in mixture] == ["/home/me/x", "org/name"]
    assert load_config(None, ["train.streaming_dataset_path=~/x"]).data.path == "/home/me/x"
    assert load_config(None, [DATA, "logging.wandb_project=~x"]).logging.wandb_project == "~x"


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_s_own_file_brings_no_notices(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    config = load_config(recipe, [DATA])
    save_config(config, tmp_path / "config.yaml")
    caplog.clear()
    with caplog.at_level("INFO", "dinov2"):
        assert load_config(tmp_path / "config.yaml") == config
    assert not caplog.messages
