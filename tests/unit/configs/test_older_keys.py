"""Keys of older files, alone and together with today's; runs that were saved with them."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from dinov2.configs import Config, ConfigError, config_from_mapping, load_config, saved_config, validate
from dinov2.configs.decode import keys_of
from dinov2.configs.older_keys import OLDER_KEYS

HF, LIST = "train.streaming_dataset_path=shards", "train.sample_list_path=list.txt"
ONLINE = ("train.online_patching=true", "online.slides=slides")


def data(*overrides: str, file: Path | None = None) -> tuple[str, str]:
    config = load_config(file, overrides)
    return config.data.path, config.data.kind


@pytest.mark.parametrize(
    ("overrides", "path", "kind"),
    [
        ([HF], "shards", "parquet"),
        ([HF, LIST], "shards", "parquet"),
        ([LIST, "train.streaming_from_hf=false", HF], "list.txt", "sample_list"),
        ([HF, "train.streaming_from_hf=false"], "", "sample_list"),
        ([HF, "train.streaming_from_hf=false", LIST, "train.streaming_from_hf=true"], "shards", "parquet"),
        ([HF, *ONLINE], "slides", "slides"),
        ([*ONLINE, HF], "slides", "slides"),
        ([*ONLINE, "train.online_patching=false", HF], "shards", "parquet"),
        ([HF, "data.path=other"], "other", "auto"),
        ([HF, "data.kind=slides"], "shards", "slides"),
        (["data.path=other", HF], "shards", "parquet"),
        (["data.path=other", LIST], "other", "auto"),
        (["data.path=other", "data.kind=slides"], "other", "slides"),
        (["data.path=other", "train.streaming_dataset_revision=v1"], "other", "auto"),
        (["data.path=slides", "train.online_patching=true"], "slides", "slides"),
        ([LIST, "train.streaming_from_hf=false", "train.datasets=[{path: a}]"], "list.txt", "sample_list"),
        (["train.streaming_dataset_path="], "", "parquet"),
    ],
)
def test_which_data(overrides: list[str], path: str, kind: str):
    assert data(*overrides) == (path, kind)


def test_which_data_of_a_file_and_the_command_line(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {streaming_from_hf: false, sample_list_path: list.txt, streaming_dataset_path: shards}\n")
    assert data(file=file) == ("list.txt", "sample_list")
    assert data("train.streaming_from_hf=true", file=file) == ("shards", "parquet")
    assert data("train.sample_list_path=other.txt", file=file) == ("other.txt", "sample_list")
    assert data("train.streaming_dataset_path=other", file=file) == ("list.txt", "sample_list")
    assert data("data.path=new", file=file) == ("new", "auto")
    file.write_text("data: {path: org/name, revision: v1}\n")
    assert data("train.streaming_from_hf=false", "train.sample_list_path=x", file=file) == (
        "x",
        "sample_list",
    )


@pytest.mark.parametrize(
    "old",
    [
        old
        for old, entry in OLDER_KEYS.items()
        if entry.new not in ("", "data.kind", "data.path") and not old.startswith(("gram.", "distillation."))
    ],
)
def test_renamed(old: str):
    new = OLDER_KEYS[old].new
    found = {path: (value, key) for path, _, key, value in keys_of(Config())}
    default, key = found[new]
    value = {bool: not default, str: "aot_eager" if "backend" in new else "text"}.get(
        type(default), 1 if key.most == 1 else 4
    )
    value = 0.5 if new.endswith("fraction") else [{"path": "a", "weight": 2}] if new.endswith("datasets") else value
    section, name = old.split(".")
    changed = config_from_mapping({section: {name: value}})
    section, name = new.split(".")
    assert changed == config_from_mapping({section: {name: value}}) != Config()


@pytest.mark.parametrize("old", [old for old, entry in OLDER_KEYS.items() if entry.ignored])
def test_without_effect(old: str, caplog: pytest.LogCaptureFixture):
    path = old.replace("compute_precision.*", "compute_precision.teacher").replace("*", "backbone")
    value = (OLDER_KEYS[old].only or ("fp16",))[0]
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert load_config(None, [f"{path}={value}"]) == Config()
    assert caplog.messages == [f"Config key {path} has no effect: {OLDER_KEYS[old].ignored}."]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.augmentation_device=gpu"], "train.augmentation_device = 'gpu' is not available"),
        (["augmentation.backend=reference"], "augmentation.backend = 'reference' is not available"),
        (["train.stream_lanes=-1"], "data.lanes (given as train.stream_lanes) = -1 is out of range"),
        (["train.stream_lanes=2", "data.lanes=-1"], "data.lanes = -1 is out of range"),
        (["train.streaming_from_hf=maybe"], "train.streaming_from_hf = 'maybe' is not valid; expected true or false"),
        (["train.stream_lane=1"], "did you mean train.stream_lanes?"),
        (["train.streaming_dataset_path=[a]"], "(given as train.streaming_dataset_path) = ['a'] is not valid"),
        (["train={stream_lanes: 1}", "data=5"], "data = 5 is not a section"),
    ],
)  # fmt: skip
def test_faults_name_the_key_as_given(overrides: list[str], words: str):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.path=x", *overrides])
    assert len(caught.value.faults) == 1 and words in caught.value.faults[0]


def test_one_key_by_two_names_in_one_file(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("train: {stream_lanes: 2}\ndata: {lanes: 3, path: x}\n")
    with pytest.raises(ConfigError, match=r"train.stream_lanes and data.lanes are the same key"):
        load_config(tmp_path / "run.yaml")
    assert load_config(None, ["train.stream_lanes=2", "data.lanes=3"]).data.lanes == 3


def test_a_saved_run_in_todays_keys(caplog: pytest.LogCaptureFixture):
    saved = {
        "train": {"streaming_from_hf": True, "streaming_dataset_path": "org/a", "stream_lanes": 16, "seed": 3,
                  "streaming_dataset_revision": "v1", "augmentation_device": "gpu", "saveckp_freq": 20, "datasets": []},
        "performance": {"packed_crops": False, "fp8": "none"},
        "augmentation": {"backend": "reference", "hed_prob": 0.1},
        "removed": {"key": 1},
    }  # fmt: skip
    form = saved_config(saved)
    assert not caplog.messages
    assert (form["data"]["path"], form["data"]["kind"], form["data"]["revision"]) == (
        "org/a",
        "parquet",
        "v1",
    )
    assert (form["data"]["lanes"], form["debug"]["packed_crops"], form["train"]["seed"]) == (16, False, 3)
    assert form["augmentation"]["hed_prob"] == 0.1 and form["optim"]["epochs"] == 100
    now = json.loads(json.dumps(dataclasses.asdict(load_config(None, ["precision=fp16", "data.path=x"]))))
    assert saved_config(now) == now


def test_the_users_readme_and_the_published_recipe(tmp_path: Path):
    """Commands as the OpenMidnight README has them."""
    file = tmp_path / "published.yaml"
    file.write_text(
        "dino: {do_kde: True, kde_loss_weight: .05, koleo_loss_weight: 0, do_koleo: False}\n"
        "train: {streaming_from_hf: true, streaming_dataset_path: medarc/TCGA-12K-parquet, skip_checkpointer: true,\n"
        "        saveckp_freq: 20, cache_dataset: true, dataset_path: 'ImageNet:split=TRAIN'}\n"
        "optim: {lr: 0.0}\nstudent: {block_chunks: 4}\n"
    )
    config = load_config(file, ["train.streaming_from_hf=false", "train.sample_list_path=sample_dataset_list.txt"])
    validate(config, world_size=8)
    assert (config.data.path, config.data.kind) == ("sample_dataset_list.txt", "sample_list")


def test_metas_names_of_another_attention(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "dinov2"):
        config = load_config(None, [HF, "student.arch=vit_large_memeff"])
    assert config.student.arch == "vit_large"
    assert any("vit_large_memeff" in record.message for record in caplog.records)
    own = config_from_mapping({"data": {"path": "x"}, "student": {"arch": "package.module:Net_memeff"}})
    assert own.student.arch == "package.module:Net_memeff"
