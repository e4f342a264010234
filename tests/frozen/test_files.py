"""The files that commands leave, frozen: names, columns and keys, and the exit status when all or a part succeeded.

One tiny run is trained, interrupted and resumed; the other commands take its teacher, its tiles or the demo's slide.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.commands import ROOT, run
from tests.helpers.runs import read_metrics, write_tissue_shards

HERE = Path(__file__).parent
TINY_RUN = HERE / "tiny_run.yaml"
METRICS = {
    "step", "total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss", "kde_loss",
    "lr", "wd", "mom", "teacher_temp", "grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head",
    "img_per_s", "data_wait_pct", "tflops", "memory_gib", "samples", "epoch", "attempt", "time",
}  # fmt: skip
SHARD = {
    "task_id": "string", "slide_path": "string", "x": "int32", "y": "int32", "level": "int32", "tile_size": "int32",
    "level_downsample": "float", "image_dtype": "string", "image_bytes": "binary", "slide_id": "string", "mpp": "float",
    "mpp_source": "string", "read_size": "int32", "tissue_frac": "float", "level_mpp": "float",
}  # fmt: skip
EMBEDDED = ["name", "slide", "x", "y", "level", "mpp", "tile_size", "embedding"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "shards", shards=2, rows=24)


def train_line(shards: Path, output_dir: Path) -> str:
    return f"--config-file {TINY_RUN} --output-dir {output_dir} train.streaming_dataset_path={shards}"


@pytest.fixture(scope="module")
def resumed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that Ctrl-C ended, and that its second start trained for two steps more; and the step that it went on from.

    The first start is a process of its own, from another folder, as users and launchers have it.
    """
    folder = tmp_path_factory.mktemp("run")
    output_dir, errors = folder / "out", folder / "stderr"
    command = [sys.executable, str(ROOT / "dinov2/train/train.py"), *train_line(shards, output_dir).split()]
    with errors.open("w") as file, subprocess.Popen(command, cwd=folder, stderr=file) as process:
        while not (output_dir / "last_checkpoint").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130, errors.read_text()
    step = int((output_dir / "last_checkpoint").read_text().removeprefix("step_"))
    assert step >= 3  # a checkpoint was due then, and is saved when asked to end
    assert run("dinov2/train/train.py", f"{train_line(shards, output_dir)} optim.early_stop={(step + 2) / 2}") == 0
    return output_dir, step


@pytest.fixture(scope="module")
def teacher(resumed: tuple[Path, int]) -> Path:
    return resumed[0] / f"eval/training_{resumed[1] + 2}/teacher_checkpoint.pth"


def test_output_folder(resumed: tuple[Path, int], shards: Path):
    folder, start = resumed
    last = f"step_{start + 2:07d}"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "attempts.jsonl",
        "last_checkpoint",
        "logs/rank_0.log",
        "stream_index",
    ):
        assert (folder / name).is_file(), name
    assert (folder / "last_checkpoint").read_text().strip() == last
    before = max(start, 3 * ((start + 1) // 3))  # one is due every third step
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step_{before:07d}", last}
    assert {path.name for path in (folder / "checkpoints" / last).iterdir()} >= {".metadata", "state.json"}
    assert list((folder / "checkpoints" / last).glob("*.distcp"))
    state = json.loads((folder / "checkpoints" / last / "state.json").read_text())
    assert (state["step"], state["samples"], state["global_batch"]) == (start + 2, 4 * (start + 2), 4)
    assert {"stream", "config", "versions"} <= state.keys()
    assert [path.name for path in (folder / "eval").iterdir()] == [f"training_{start + 2}"]
    load = importlib.import_module("dinov2.configs").load_config
    given = [f"train.streaming_dataset_path={shards}", f"optim.early_stop={(start + 2) / 2}"]
    assert load(folder / "config.yaml") == load(TINY_RUN, given)
    assert len(list(folder.glob("config.*.yaml"))) == 1, "the configuration of the first start is kept"


def test_metrics(resumed: tuple[Path, int]):
    records = read_metrics(resumed[0])
    assert all(record.keys() >= METRICS for record in records)
    assert [record["samples"] for record in records] == [4 * record["step"] for record in records]
    assert {record["attempt"] for record in records} == {1, 2} and records[-1]["attempt"] == 2
    steps = [record["step"] for record in records]
    assert steps[-2:] == [resumed[1] + 1, resumed[1] + 2]
    assert set(steps) >= set(range(1, resumed[1] + 3))


def test_launches(resumed: tuple[Path, int]):
    launches = [json.loads(line) for line in (resumed[0] / "attempts.jsonl").read_text().splitlines()]
    assert [(launch["attempt"], launch["step"]) for launch in launches] == [(1, 0), (2, resumed[1])]
    assert launches[0].keys() == {"attempt", "time", "step", "host", "processes", "device", "commit"}
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert head.returncode or head.stdout.startswith(launches[0]["commit"].removesuffix("-dirty"))


def test_starts_that_train_nothing(resumed: tuple[Path, int], shards: Path, tmp_path: Path):
    folder = shutil.copytree(resumed[0], tmp_path / "out")
    line = f"{train_line(shards, folder)} optim.early_stop={(resumed[1] + 2) / 2}"
    assert run("dinov2/train/train.py", f"{line} --no-resume") == 2
    shutil.rmtree(folder / "eval")
    assert run("dinov2/train/train.py", f"{line} --eval-only") == 0
    assert (folder / f"eval/training_{resumed[1] + 2}/teacher_checkpoint.pth").is_file()
    assert run("dinov2/train/train.py", f"{train_line(shards, tmp_path / 'new')} --dry-run") == 0
    assert not (tmp_path / "new").exists()


def test_teacher_export(teacher: Path, resumed: tuple[Path, int]):
    spec = yaml.safe_load((HERE / "interface.yaml").read_text())["state_dicts"]["tiny_run"]
    blocks = {f"backbone.blocks.{n}.{key}": shape for n in range(4) for key, shape in spec["block"].items()}
    exported = torch.load(teacher, weights_only=True)
    assert exported.keys() == {"teacher"}
    assert {key: list(tensor.shape) for key, tensor in exported["teacher"].items()} == spec["tensors"] | blocks
    assert {tensor.dtype for tensor in exported["teacher"].values()} == {torch.float32}
    described = json.loads(teacher.with_suffix(".json").read_text())
    assert described.keys() >= {"architecture", "step", "samples", "config"}
    assert (described["step"], described["samples"]) == (resumed[1] + 2, 4 * (resumed[1] + 2))
    assert described["architecture"].items() >= {
        "arch": "vit_demo", "patch_size": 14, "ffn_layer": "mlp", "num_register_tokens": 2, "qkv_bias": True,
        "proj_bias": True, "ffn_bias": True, "interpolate_antialias": True, "interpolate_offset": 0.0,
        "init_values": 1.0, "img_size": 56,
    }.items()  # fmt: skip
    assert described["config"]["augmentation"]["normalize_mean"] == [0.485, 0.456, 0.406]
    assert described["config"]["crops"]["global_crops_size"] == 56


def test_teacher_opens(teacher: Path):
    images = torch.rand(2, 3, 56, 56)
    hubconf = importlib.import_module("hubconf")
    assert hubconf.dependencies == ["torch"]
    model = torch.hub.load(str(ROOT), "pathfm_teacher", source="local", path=str(teacher))
    open_teacher = importlib.import_module("dinov2.hub").load_teacher
    both = open_teacher(checkpoint_path=str(teacher), output="cls_mean")(images)
    (features,) = open_teacher(str(teacher), feature_map=True)(images)
    assert both.shape == (2, 256) and features.shape == (2, 128, 4, 4)
    assert torch.equal(model(images), both[:, :128])


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("meta", {"README.md", "backbone.pth", "backbone.json"}),
        ("timm", {"README.md", "model.safetensors", "config.json"}),
        ("hf", {"README.md", "model.safetensors", "config.json", "preprocessor_config.json"}),
        ("onnx", {"README.md", "model.onnx", "model.json", "preprocessor_config.json"}),
    ],
)
def test_exports_for_other_libraries(teacher: Path, tmp_path: Path, library: str, files: set[str]):
    assert run("dinov2.export", f"--checkpoint {teacher} --format {library} --output {tmp_path}") == 0
    assert {path.name for path in tmp_path.iterdir()} == files


def test_report(resumed: tuple[Path, int], shards: Path, tmp_path: Path):
    assert run("dinov2.report", f"{resumed[0]} --tiles {shards} --output {tmp_path / 'report'}") == 0
    files = {"report.html", "loss_curves.png", "crops.png", "pca.png", "attention.png", "neighbours.png",
             "embeddings.npy"}  # fmt: skip
    assert {path.name for path in (tmp_path / "report").iterdir()} == files


def test_embeddings(teacher: Path, shards: Path, tmp_path: Path):
    line = f"--checkpoint {teacher} --input {shards} --output {tmp_path / 'out'} --device cpu --resize 56 --workers 1"
    assert run("dinov2.eval.embed", line) == 0
    assert (tmp_path / "out/_embedding.json").is_file()
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == EMBEDDED
    assert table.num_rows == 48 and len(table["embedding"][0]) == 128


def test_probes(teacher: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / f"tiles/{split}/{label}").mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (56, 56, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"tiles/{split}/{label}/{number}.png")
    line = f"--checkpoint {teacher} --data {tmp_path}/tiles --probes knn,rankme --device cpu"
    for output in ("probes.csv", "probes.json"):
        assert run("dinov2.eval.probe", f"{line} --output {tmp_path / output}") == 0
        assert (tmp_path / output).is_file()


def test_inspect_and_repack(shards: Path, tmp_path: Path):
    assert run("dinov2.data.inspect", f"{shards} --batch 4 --ranks 1 --json {tmp_path / 'report.json'}") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"]["usable"] is True
    assert (report["files"], report["rows"]) == (2, 48)
    assert run("dinov2.data.repack", f"{shards} {tmp_path / 'small'} --row-group-rows 4 --workers 1") == 0
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "shard-00000.parquet",
        "shard-00001.parquet",
    }
    assert pq.read_metadata(tmp_path / "small/shard-00000.parquet").num_row_groups == 6
    broken = shutil.copytree(shards, tmp_path / "broken")
    (broken / "shard-00001.parquet").write_bytes(b"PAR1 and no more")
    assert run("dinov2.data.repack", f"{broken} {tmp_path / 'part'} --workers 1") == 1
    assert {path.name for path in (tmp_path / "part").iterdir()} == {"shard-00000.parquet", "failures.jsonl"}


def test_from_a_slide_to_shards(tmp_path: Path):
    """With one slide that is none among two: done with failures, unless the share that is forgiven allows for it."""
    folder, scripts = tmp_path / "slides", "prepatching_scripts"
    assert run(f"{scripts}/make_demo_slide.py", f"--output-dir {folder}") == 0
    assert {path.name for path in folder.iterdir()} == {"demo_train.svs", "demo_holdout.svs"}
    (folder / "demo_holdout.svs").write_text("no slide")
    list_file, create = tmp_path / "list.txt", f"{folder} --levels 1 --per-level 6 --workers 1"
    assert run(f"{scripts}/create_sample_dataset_txt.py", f"{create} --output {tmp_path / 'strict.txt'}") == 1
    line = f"{create} --output {list_file} --max-failed-share 0.5 --preview {tmp_path / 'preview'}"
    assert run(f"{scripts}/create_sample_dataset_txt.py", line) == 0
    lines = list_file.read_text().splitlines()
    assert len(lines) == 6 and all(re.fullmatch(r".*/demo_train\.svs \d+ \d+ 1", line) for line in lines)
    described = json.loads((tmp_path / "list.txt.meta.json").read_text())
    assert {"columns", "seed", "tile_size", "rule", "num_patches"} <= described.keys()
    assert (tmp_path / "list.txt.failures.jsonl").is_file()
    assert len(list((tmp_path / "preview").rglob("*.png"))) == 1
    build = f"{list_file} --output {tmp_path / 'shards'} --encoding jpeg --workers 1"
    assert run(f"{scripts}/build_parquet_sample_dataset.py", build) == 0
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"00000000.parquet", "_build.json"}
    schema = pq.read_schema(tmp_path / "shards/00000000.parquet")
    assert {field.name: str(field.type) for field in schema} == SHARD
    assert (schema.metadata[b"image_encoding"], schema.metadata[b"tile_size"]) == (b"jpeg", b"224")
    list_file.write_text(f"{list_file.read_text()}{folder}/demo_holdout.svs 0 0 0\n")
    shutil.move(tmp_path / "list.txt.meta.json", tmp_path / "aside.json")
    build = f"{list_file} --output {tmp_path / 'strict'} --workers 1"
    assert run(f"{scripts}/build_parquet_sample_dataset.py", build) == 1
    assert (tmp_path / "strict/failures.jsonl").is_file()
    index = f"{folder} --output {tmp_path / 'index'} --zarr --workers 1"
    assert run(f"{scripts}/index_slides.py", index) == 1
    assert run(f"{scripts}/index_slides.py", f"{index} --max-failed-share 0.5") == 0
    files = {path.name for path in (tmp_path / "index").iterdir()}
    assert files == {"tiles.index", "failures.jsonl", "zarr"}
