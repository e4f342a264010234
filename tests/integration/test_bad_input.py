"""What a user can get wrong ends in one sentence that names it, and harms nothing that was there."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2.fsdp import Checkpointer
from dinov2.train.output_folder import hold_output_dir
from dinov2.train.state import decode_state
from dinov2.train.train import main
from tests.helpers.checkpoints import seal, unseal
from tests.helpers.runs import TINY, read_metrics
from tests.helpers.training import in_precision

BF16 = in_precision("bf16")

CHECKPOINT = "checkpoints/step_0000003"


def train(shards: Path | str, output_dir: Path | str, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    data = f"data.path={shards}"
    return main(["--output-dir", str(output_dir), *flags, *TINY, data, *overrides])


def errors(capsys: pytest.CaptureFixture) -> list[str]:
    """The error lines of what was written to stderr, which must hold no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line[14:17] == " E "]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size_per_gpu=auto"], "train.batch_size_per_gpu = auto needs a GPU"),
        (["train.batch_size_per_gpu=automatic"], "train.batch_size_per_gpu = 'automatic' is not valid"),
        (
            ["performance.compile=maybe"],
            "performance.compile = 'maybe' is not valid",
        ),
        (
            ["performance.compile=1"],
            "performance.compile = 1 is not valid",
        ),
        (["performance.fused_update=true"], "performance.fused_update = true cannot be used"),
        (
            ["performance.fp8=teacher"],
            "compute_precision.teacher.backbone.mixed_precision.param_dtype = fp32",
        ),
        (
            [*BF16, "performance.fp8=all", "student.ffn_layer=swiglufused"],
            "0.mlp.w3 maps 344 to 128 features, while FP8 needs multiples of 16",
        ),
        (["student.attention_backend=cudnn"], "student.attention_backend = cudnn cannot be used"),
        (["student.attention_backend=fast"], "student.attention_backend = 'fast' is not valid"),
        (["performance.prefetch_blocks=-1"], "performance.prefetch_blocks = -1 is out of range"),
        (["performance.recompute=true"], "performance.recompute = True is not valid"),
    ],
)
def test_performance(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str):
    assert train(shards, tmp_path / "out", *overrides) == 2
    (error,) = errors(capsys)
    assert message in error


def image(width: int, height: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_shard(folder: Path, images: list[bytes | None], paths: pa.Array | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    paths = pa.array([f"slide/{i}_0_0.jpg" for i in range(len(images))]) if paths is None else paths
    table = pa.table({"path": paths, "jpeg": pa.array(images, pa.binary())})
    pq.write_table(table, folder / "shard.parquet", row_group_size=8)
    return folder


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that has stopped after 4, with checkpoints at 3 and 4."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    assert train(shards, output_dir, "optim.early_stop=1") == 0
    return output_dir


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  seed: 1\n  seed: 2\n", "key seed is there twice, in line 2 and 3"),
        ("train:\n\tseed: 1\n", "line 2, column 1"),
        ("- train\n", "holds a list; sections with keys are expected"),
        ("5\n", "holds the value 5"),
        ("train:\n  output_dir: caf\xe9\n", "can't decode byte 0xe9"),
        ('train: !!python/object/apply:os.system ["false"]\n', "could not determine a constructor"),
        ("train: 5\n", "train = 5 is not a section"),
        ("compute_precision: {student: {backbone: {mixed_precission: {}}}}\n", "did you mean "
         "compute_precision.student.backbone.mixed_precision?"),
    ],
)  # fmt: skip
def test_config_file(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    assert main(["--config-file", str(tmp_path / "bad.yaml"), "--dry-run"]) == 2
    (error,) = errors(capsys)
    assert message in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=[1, 2]", "train.seed = [1, 2] is not valid; expected a whole number"),
        (
            f"train.seed={2**64}",
            f"train.seed = {2**64} is out of range",
        ),
        ("train.seed=-1", "train.seed = -1 is out of range"),
        ("train.output_dir=[1", "Override 'train.output_dir=[1' has no value in YAML syntax"),
        ("optim.epochs=.inf", "optim.epochs = inf is not valid"),
        ("optim.early_stop=0.01", "make 0.04 steps; at least one is expected"),
        ("student.layerscale=-1", "student.layerscale = -1 is out of range"),
        (
            "ibot.mask_ratio_min_max=[0.001, 0.01]",
            "mask none of 4 x 4 patches (crops.global_crops_size by student.patch_size); set the weight to 0",
        ),
        ("crops.global_crops_size=14", "mask none of 1 x 1 patches"),
        ("student.pretrained_weights=/no/w.pth", "student.pretrained_weights = '/no/w.pth' is no file"),
        ("MODEL.WEIGHTS=/no/w.pth", "MODEL.WEIGHTS = '/no/w.pth' is no file"),
        ("train.use_pretrained=true", "no published DINOv2 weights for vit_demo"),
        ("train.unfreeze_last_n_blocks=9", "exceeds the 4 blocks of vit_demo"),
    ],
)
def test_values_are_refused_by_a_dry_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
):
    assert train(shards, tmp_path / "out", override, flags=("--dry-run",)) == 2
    (error,) = errors(capsys)
    assert message in error


def test_only_one_source_of_starting_weights(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    overrides = ("MODEL.WEIGHTS=a.pth", "train.use_pretrained=true")
    assert train(shards, tmp_path / "out", *overrides, flags=("--dry-run",)) == 2
    (error,) = errors(capsys)
    assert "MODEL.WEIGHTS = a.pth" in error and "train.use_pretrained = true" in error


@pytest.mark.parametrize("override", ["ibot.mask_ratio_min_max=[1, 1]", "crops.local_crops_number=0",
                                      "ibot.mask_sample_probability=0", f"train.seed={2**64 - 1}"])  # fmt: skip
def test_extreme_values_train(shards: Path, tmp_path: Path, override: str):
    weight = ("ibot.loss_weight=0",) if "sample_probability" in override else ()
    few = ("optim.early_stop=0.5", "train.skip_checkpointer=true")
    assert train(shards, tmp_path / "out", override, *few, *weight) == 0
    assert all(np.isfinite(record["total_loss"]) for record in read_metrics(tmp_path / "out"))


def test_odd_images_train(tmp_path: Path):
    """Of one pixel, of one line, grey, with transparency, with a palette, for print."""
    odd = [image(1, 1), image(3000, 10), image(10, 3000), image(40, 40, "L"), image(40, 40, "RGBA"),
           image(40, 40, "P"), image(40, 40, "1"), image(40, 40, "CMYK", "JPEG")]  # fmt: skip
    data = write_shard(tmp_path / "a b=c ünï [x]", odd)
    assert train(data, tmp_path / "out ö", "optim.early_stop=0.5", "train.skip_checkpointer=true") == 0
    assert all(np.isfinite(record["total_loss"]) for record in read_metrics(tmp_path / "out ö"))


@pytest.mark.parametrize("bad", [b"<html>404</html>", b"", None, image(40, 40)[:300]])
def test_one_corrupt_row_is_replaced_and_named(tmp_path: Path, capsys, bad: bytes | None):
    data = write_shard(tmp_path / "data", [image(40, 40)] * 7 + [bad])
    assert train(data, tmp_path / "out", "optim.early_stop=0.25", "train.skip_checkpointer=true") == 0
    assert "row 7 of row group 0" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_corrupt_rows(tmp_path: Path, capsys: pytest.CaptureFixture, workers: int):
    data = write_shard(tmp_path / "data", [b"<html>404</html>"] * 8)
    assert train(data, tmp_path / "out", f"train.num_workers={workers}") == 2
    (error,) = errors(capsys)
    assert f"none of the 8 rows of row group 0 of shard '{data}/shard.parquet' is an image" in error
    assert "b'<html>40'" in error


def test_a_dry_run_decodes_rows(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_shard(tmp_path / "data", [image(40, 40)] * 10 + [b"GIF89a"] * 2)
    assert train(data, tmp_path / "out", flags=("--dry-run",)) == 2
    (error,) = errors(capsys)
    assert f"row 2 of row group 1 of shard '{data}/shard.parquet'" in error


def test_a_slide_column_of_the_wrong_type(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_shard(tmp_path / "data", [image(40, 40)] * 8, paths=pa.array(range(8)))
    assert train(data, tmp_path / "out") == 2
    (error,) = errors(capsys)
    assert "column 'path' of shard" in error and "has type int64; string is expected" in error


@pytest.mark.parametrize("name", ["checkpoints", "eval", "logs"])
def test_names_of_a_run_that_are_taken(shards: Path, tmp_path: Path, capsys, name: str):
    (tmp_path / name).write_text("mine")
    assert train(shards, tmp_path) == 2
    (error,) = errors(capsys)
    assert f"holds something else under {name}" in error
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_an_earlier_config_is_kept(shards: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    assert train(shards, tmp_path, "optim.early_stop=0.25", "train.skip_checkpointer=true") == 0
    (kept,) = tmp_path.glob("config.*.yaml")
    assert kept.read_text() == "mine: 1\n"


def test_a_url_is_no_output_folder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    assert train(shards, "s3://KEY:PASSWORD@bucket/out") == 2
    (error,) = errors(capsys)
    assert "bucket" in error and "PASSWORD" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_launch_is_using(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert train(shards, tmp_path) == 2
        other.stdin.close()
    (error,) = errors(capsys)
    assert f"Output folder '{tmp_path}' is in use by another" in error


def test_the_launch_that_uses_a_folder_is_named(tmp_path: Path):
    with hold_output_dir(tmp_path, resume=True):
        hold = "import pathlib, dinov2.utils.files as f\nwith f.locked(pathlib.Path('.lock'), busy='{holder}'): 0"
        other = subprocess.run([sys.executable, "-c", hold], cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode and f"process {os.getpid()} on {socket.gethostname()}" in other.stderr


def test_a_finished_run_says_so_and_stays_as_it_is(shards: Path, stopped: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*") if path.is_file()}
    assert train(shards, output_dir, "optim.early_stop=1") == 0
    assert "Nothing is left to train" in capsys.readouterr().err
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"rank_0.log", ".lock"}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "zeroed", "empty", "missing"])
def test_a_corrupt_checkpoint_is_set_aside(
    shards: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, damage: str
):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    file = output_dir / "checkpoints/step_0000004" / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"truncated": whole[:-200], "zeroed": bytes(len(whole)), "empty": b""}[damage])
    assert train(shards, output_dir, "optim.early_stop=1") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "is corrupt" in line]
    assert len(said) == 1 and "step_0000004" in said[0] and name in said[0]
    kept = {path.name for path in (output_dir / "checkpoints").iterdir()}
    assert kept == {"step_0000003", "step_0000004", "step_0000004.corrupt"}
    assert [record["step"] for record in read_metrics(output_dir)] == [1, 2, 3, 4, 4]


def test_no_checkpoint_left_ends_every_launch(shards: Path, stopped: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    for folder in (output_dir / "checkpoints").iterdir():
        (folder / "__0_0.distcp").unlink()
    for _ in range(2):
        assert train(shards, output_dir, "optim.early_stop=1") == 2
        (error,) = errors(capsys)
        assert str(output_dir / "checkpoints") in error
    assert [record["step"] for record in read_metrics(output_dir)] == [1, 2, 3, 4]


MISTYPED = {
    "step": ["4", 4.5, True, None, -4, [4], 10**30],
    "samples": ["32", 4, -1, None, 32.0],
    "global_batch": [0, "8", None, 16],
    "stream": [[], None, {}, {"lanes": "16"}],
    "config": [[], "yes", None, {}],
    "config_sha256": ["", None, 0],
    "scaler": [1, {"scale": "65536"}, {"scale": -1}],
    "places": ["here", [1], None],
    "loss_modules": [7, {"koleo": 1}],
    "versions": [3],
    "unheard_of": [0],
}


@pytest.mark.parametrize("sealed", [True, False], ids=["its checksums fit", "of an earlier version"])
def test_mistyped_states(stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, sealed: bool):
    """A sentence names file and key. Where the file is as it was written no damage is claimed, and it stays."""
    for number, (name, value) in enumerate((name, value) for name, values in MISTYPED.items() for value in values):
        output_dir = shutil.copytree(stopped, tmp_path / str(number))
        newest = output_dir / "checkpoints/step_0000004"
        if not sealed:
            unseal(newest)
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps(state | {name: value}))
        caplog.clear()
        if sealed:
            seal(newest)
            with pytest.raises(ValueError, match=rf"state\.json.*\b{name}\b"):
                Checkpointer(output_dir, keep=2).newest(decode_state)
            assert newest.is_dir()
        else:
            assert Checkpointer(output_dir, keep=2).newest(decode_state)["step"] == 3
            (warning,) = caplog.messages
            assert "state.json" in warning and name in warning and not newest.exists()
        shutil.rmtree(output_dir)


def test_states_without_a_key(stopped: Path, tmp_path: Path):
    needed = {"step", "samples", "global_batch", "stream", "config", "config_sha256"}
    keys = json.loads((stopped / "checkpoints/step_0000004/state.json").read_text()).keys()
    assert needed < keys
    for name in keys:
        output_dir = shutil.copytree(stopped, tmp_path / name)
        newest = output_dir / "checkpoints/step_0000004"
        unseal(newest)
        state = json.loads((newest / "state.json").read_text())
        state.pop(name, None)
        (newest / "state.json").write_text(json.dumps(state))
        found = Checkpointer(output_dir, keep=2).newest(decode_state)
        assert found["step"] == (3 if name in needed else 4)


def test_a_checkpoint_of_the_format_before_is_resumed(shards: Path, stopped: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    unseal(output_dir / CHECKPOINT.replace("3", "4"))
    assert train(shards, output_dir, "optim.early_stop=1.25") == 0
    assert "has no checksums" in capsys.readouterr().err
    assert [record["step"] for record in read_metrics(output_dir)] == [1, 2, 3, 4, 5]


def test_remains_of_killed_processes_are_swept(shards: Path, stopped: Path, tmp_path: Path):
    """Of what a run writes itself; whatever else lies in its folder stays."""
    output_dir, part = shutil.copytree(stopped, tmp_path / "out"), f"{'0a' * 16}.part"
    ours = ["checkpoints/step_0000009.incomplete", f".last_checkpoint.{part}", f".config.yaml.{part}",
            f".stream_index.{part}", f".stream_index.1.{part}", f"eval/training_4/.teacher_checkpoint.pth.{part}",
            f"eval/training_4/.teacher_checkpoint.json.{part}", ".write_probe_1234"]  # fmt: skip
    foreign = ["checkpoints/step_best.incomplete", "checkpoints/mine.tmp", f".notes.txt.{part}", "checkpoints/.tmp",
               "eval/training_4/.teacher_checkpoint.pth.part", f"eval/.teacher_checkpoint.pth.{part}",
               f"eval/training_best/.teacher_checkpoint.pth.{part}", "step_0000009.incomplete"]  # fmt: skip
    for name in (*ours, *foreign):
        path = output_dir / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith(".incomplete") else path.touch()
    assert train(shards, output_dir, "optim.early_stop=1") == 0
    assert not [name for name in ours if (output_dir / name).exists()]
    assert all((output_dir / name).exists() for name in foreign)


def test_a_checkpoint_that_cannot_be_written(shards: Path, tmp_path: Path, capsys, monkeypatch):
    """The earlier checkpoint survives a full disk, and the half-written one is removed."""
    save = torch.distributed.checkpoint.save

    def full(tensors: dict, storage_writer: object, **kwargs: object) -> None:
        if "0000003" not in str(storage_writer.path):
            raise OSError(28, "No space left on device")
        save(tensors, storage_writer=storage_writer, **kwargs)

    monkeypatch.setattr(torch.distributed.checkpoint, "save", full)
    assert train(shards, tmp_path / "out", "optim.epochs=10") == 2
    (error,) = errors(capsys)
    assert len(read_metrics(tmp_path / "out")) < 9  # where the next one is due
    assert "step_0000006' cannot be written ([Errno 28] No space left on device; " in error
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step_0000003"]
    monkeypatch.undo()
    assert train(shards, tmp_path / "out", "optim.epochs=10", "optim.early_stop=1") == 0
    assert f"Resumed from {tmp_path / 'out' / CHECKPOINT}" in capsys.readouterr().err


def test_precision_may_change_on_resume(shards: Path, stopped: Path, tmp_path: Path):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    fp16 = "compute_precision.student.backbone.mixed_precision.param_dtype=fp16"
    assert train(shards, output_dir, fp16, "optim.early_stop=1.25") == 0


def test_eval_only_needs_a_checkpoint_and_no_data(stopped: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(stopped, tmp_path / "out")
    shutil.rmtree(output_dir / "eval")
    assert train("/no/such/data", output_dir, flags=("--eval-only",)) == 0
    assert (output_dir / "eval/training_4/teacher_checkpoint.pth").is_file()
    assert train("/no/such/data", tmp_path / "none", flags=("--eval-only",)) == 2
    (error,) = errors(capsys)
    assert "none' holds no complete checkpoint to export" in error and not (tmp_path / "none").exists()
