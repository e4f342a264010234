"""Whole runs through the command's own entry point: artefacts, resumption, refusals."""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
from collections.abc import Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dinov2.configs import load_config
from dinov2.logging.health import HealthWatch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from tests.helpers.checkpoints import flip, seal
from tests.helpers.runs import TINY, checkpoint_tensors, read_metrics, write_tissue_shards


def train(shards: Path, output_dir: Path, *overrides: str, flags: tuple[str, ...] = ()) -> int:
    data = f"train.streaming_dataset_path={shards}"
    return main(["--output-dir", str(output_dir), *flags, *TINY, data, *overrides])


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, uninterrupted."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    assert train(shards, output_dir) == 0
    return output_dir


def test_artefacts(finished: Path):
    assert (finished / "last_checkpoint").read_text() == "step_0000008"
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step_0000006", "step_0000008"]
    state = json.loads((finished / "checkpoints/step_0000008/state.json").read_text())
    assert (state["step"], state["samples"], state["global_batch"]) == (8, 64, 8)
    records = read_metrics(finished)
    assert [record["step"] for record in records] == list(range(1, 9))
    terms = ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "kde_loss", "koleo_loss")
    for record in records:
        weights = dict(zip(terms, (1, 1, 1, 0.05, 0.1), strict=True))
        total = sum(weight * record[term] for term, weight in weights.items())
        assert record["total_loss"] == pytest.approx(total, rel=1e-5)
        for key in ("lr", "wd", "mom", "teacher_temp", "grad_norm_backbone", "img_per_s", "data_wait_pct"):
            assert record[key] >= 0


def test_exported_teacher_is_the_checkpoints_teacher(finished: Path):
    exported = torch.load(finished / "eval/training_8/teacher_checkpoint.pth", weights_only=True)["teacher"]
    tensors = checkpoint_tensors(finished, 8)
    saved = {key.removeprefix("/teacher/"): value for key, value in tensors.items() if key.startswith("/teacher/")}
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[key], saved[key]) and exported[key].dtype == torch.float32 for key in saved)
    assert {key.split(".")[0] for key in exported} == {"backbone", "dino_head", "ibot_head"}
    description = json.loads((finished / "eval/training_8/teacher_checkpoint.json").read_text())
    assert (description["architecture"]["arch"], description["step"], description["samples"]) == (
        "vit_demo",
        8,
        64,
    )


def test_interrupted_equals_uninterrupted_bit_for_bit(shards: Path, finished: Path, tmp_path: Path):
    output_dir = tmp_path / "out"
    assert train(shards, output_dir, "optim.early_stop=1.25") == 0  # 5 steps, then a new process would come
    assert train(shards, output_dir) == 0
    whole, parts = checkpoint_tensors(finished, 8), checkpoint_tensors(output_dir, 8)
    assert whole.keys() == parts.keys()
    different = [key for key in whole if not torch.equal(whole[key], parts[key])]
    assert not different
    assert any("exp_avg_sq" in key for key in whole)
    losses = [record["total_loss"] for record in read_metrics(output_dir)]
    assert losses == [record["total_loss"] for record in read_metrics(finished)]


@pytest.mark.parametrize("background", [False, True])
def test_bit_equal_after_a_checkpoint_was_set_aside(shards: Path, finished: Path, tmp_path: Path, background: bool):
    """The steps since the one before are made again, to the bit, and the corrupt one stays as it is."""
    output_dir, saving = tmp_path / "out", f"train.async_checkpoints={str(background).lower()}"
    assert train(shards, output_dir, "optim.early_stop=1.25", saving) == 0  # checkpoints of steps 3 and 5
    (broken,) = (output_dir / "checkpoints/step_0000005").glob("*.distcp")
    flip(broken, 8 * (broken.stat().st_size // 2))
    before = broken.read_bytes()
    assert train(shards, output_dir, saving) == 0
    whole, parts = checkpoint_tensors(finished, 8), checkpoint_tensors(output_dir, 8)
    assert whole.keys() == parts.keys()
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]
    losses = {record["step"]: record["total_loss"] for record in read_metrics(output_dir)}
    assert losses == {record["step"]: record["total_loss"] for record in read_metrics(finished)}
    assert [record["step"] for record in read_metrics(output_dir)] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert (output_dir / "checkpoints/step_0000005.corrupt" / broken.name).read_bytes() == before


def test_workers_do_not_change_the_run(shards: Path, finished: Path, tmp_path: Path):
    assert train(shards, tmp_path / "out", "train.num_workers=2", "optim.early_stop=1") == 0
    losses = [record["total_loss"] for record in read_metrics(tmp_path / "out")]
    assert losses == [record["total_loss"] for record in read_metrics(finished)[:4]]


def test_bf16_stays_near_fp32(shards: Path, finished: Path, tmp_path: Path):
    overrides = [item.replace("fp32", "bf16") for item in TINY if item.endswith("fp32")]
    assert train(shards, tmp_path / "out", *overrides, "optim.early_stop=1") == 0
    for reduced, full in zip(read_metrics(tmp_path / "out"), read_metrics(finished)[:4], strict=True):
        assert reduced["total_loss"] == pytest.approx(full["total_loss"], rel=0.02)


def test_fp16_scaler_skips_overflows_and_then_learns(shards: Path, tmp_path: Path):
    overrides = [item.replace("fp32", "fp16") for item in TINY if item.endswith("fp32")]
    assert train(shards, tmp_path / "out", *overrides, "optim.epochs=4", "train.skip_checkpointer=true") == 0
    records = read_metrics(tmp_path / "out")
    assert records[0]["grad_norm_backbone"] is None  # not finite: the first scale of 65,536 is too large
    assert all(math.isfinite(record["total_loss"]) for record in records)
    assert all(math.isfinite(record["grad_norm_backbone"]) for record in records[-4:])
    assert records[-1]["total_loss"] < 0.9 * records[0]["total_loss"]


def test_a_non_finite_loss_stops_before_the_update(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Student, teacher and optimiser are at the last good step when the run stops, whatever came after."""
    compute, archs = SSLMetaArch.compute_losses, []

    def poisoned(self: SSLMetaArch, *args: Any) -> dict:
        losses = compute(self, *args)
        if not isinstance(losses["total_loss"], FakeTensor):  # the plan measures a step beforehand
            archs.append(self)
        if len(archs) == 4:
            losses["total_loss"] = losses["total_loss"] * float("nan")
        return losses

    monkeypatch.setattr(SSLMetaArch, "compute_losses", poisoned)
    assert train(shards, tmp_path / "out") == 2
    assert "Step 4 is not finite on rank 0 (samples 24 to 31)" in capsys.readouterr().err
    dumped = json.loads((tmp_path / "out/dumps/step_4/rank_0.json").read_text())
    assert dumped["indices"] == list(range(24, 32)) and dumped["values"]["total_loss"] == "nan"
    assert dumped["values"]["grad_norm_backbone"] == "nan"
    good = checkpoint_tensors(tmp_path / "out", 3)
    for network in ("student", "teacher"):
        for name, tensor in getattr(archs[0], network).state_dict().items():
            assert torch.equal(tensor, good[f"/{network}/{name}"]), name
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "step_0000003"


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_collapse_ends_a_run_that_asks_for_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, action: str
):
    """Told at step 6, at which a checkpoint is due."""

    class AtStep6(HealthWatch):
        def write(self, record: Mapping[str, Any]) -> None:
            super().write(record)
            if record["step"] == 6:
                self.collapse = "the networks have collapsed."

    monkeypatch.setattr("dinov2.train.run.HealthWatch", AtStep6)
    out, stops = tmp_path / "out", action == "stop"
    assert train(shards, out, f"train.on_collapse={action}") == (2 if stops else 0)
    assert [record["step"] for record in read_metrics(out)] == list(range(1, 7 if stops else 9))
    assert (out / "last_checkpoint").read_text() == ("step_0000003" if stops else "step_0000008")
    assert (out / "eval").exists() == (not stops)
    assert ("the networks have collapsed." in capsys.readouterr().err) == stops


def test_no_resume_never_touches_an_existing_run(shards: Path, finished: Path, capsys: pytest.CaptureFixture):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train(shards, finished, flags=("--no-resume",)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_resume_with_a_changed_dataset_is_refused(shards: Path, finished: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    other = write_tissue_shards(tmp_path / "other", shards=2)
    assert train(other, output_dir) == 2
    assert f"dataset '{other}' changed" in capsys.readouterr().err


def test_resume_with_an_incompatible_config_is_refused(shards: Path, finished: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    assert train(shards, output_dir, "student.num_register_tokens=4", "train.seed=1") == 2
    error = capsys.readouterr().err
    assert "student.num_register_tokens was 2 and is now 4" in error
    assert "train.seed was 0 and is now 1" in error


def test_eval_only_exports_the_newest_checkpoint(shards: Path, finished: Path, tmp_path: Path):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(output_dir / "eval")
    assert train(shards, output_dir, flags=("--eval-only",)) == 0
    exported = torch.load(output_dir / "eval/training_8/teacher_checkpoint.pth", weights_only=True)
    original = torch.load(finished / "eval/training_8/teacher_checkpoint.pth", weights_only=True)
    assert all(torch.equal(exported["teacher"][key], value) for key, value in original["teacher"].items())


def test_eval_only_describes_the_run_and_not_the_command_line(finished: Path, tmp_path: Path):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    export = output_dir / "eval/training_8"
    trained = (export / "teacher_checkpoint.json").read_bytes()
    shutil.rmtree(export)
    others = ("augmentation.normalize_mean=[0.5,0.5,0.5]", "train.allow_changes=true", "crops.global_crops_size=112")
    assert main(["--eval-only", "--output-dir", str(output_dir), *others]) == 0
    assert (export / "teacher_checkpoint.json").read_bytes() == trained


@pytest.mark.parametrize("file", ["teacher_checkpoint.pth", "teacher_checkpoint.json"])
def test_no_export_replaces_another(shards: Path, finished: Path, tmp_path: Path, file: str):
    """With --eval-only that is an error; a run that trains goes on."""
    output_dir = shutil.copytree(finished, tmp_path / "out")
    eval_only = ["--eval-only", "--output-dir", str(output_dir)]
    export = output_dir / "eval/training_8"
    assert main(eval_only) == 0  # the same one
    (export / file).write_text("mine")
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    assert main(eval_only) == 2
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    shutil.rmtree(output_dir / "checkpoints/step_0000008")  # as a run that was killed before it saved that one
    assert train(shards, output_dir) == 0
    assert (output_dir / "checkpoints/step_0000008").is_dir()
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before


def test_dry_run_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert train(shards, tmp_path / "out", flags=("--dry-run",)) == 0
    shown = capsys.readouterr().out
    assert "8 of a 8-step schedule" in shown
    assert "90 tiles" in shown
    assert not (tmp_path / "out").exists()


def test_skip_checkpointer(shards: Path, tmp_path: Path):
    assert train(shards, tmp_path / "out", "train.skip_checkpointer=true", "optim.early_stop=1") == 0
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert (tmp_path / "out" / "eval/training_4/teacher_checkpoint.pth").exists()


def test_starting_from_an_export(shards: Path, finished: Path, tmp_path: Path):
    """With a learning rate of almost nothing, the exported teacher is the one started from."""
    teacher = finished / "eval/training_8/teacher_checkpoint.pth"
    overrides = (f"MODEL.WEIGHTS={teacher}", "optim.base_lr=1e-30", "optim.min_lr=0", "optim.early_stop=1",
                 "optim.weight_decay=0", "optim.weight_decay_end=0")  # fmt: skip
    assert train(shards, tmp_path / "out", *overrides) == 0
    start = torch.load(teacher, weights_only=True)["teacher"]
    after = torch.load(tmp_path / "out/eval/training_4/teacher_checkpoint.pth", weights_only=True)["teacher"]
    for key, value in start.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.streaming_dataset_path=/nowhere/at/all"], "/nowhere/at/all"),
        (["train.batch_sie=1"], "train.batch_sie"),
        (["crops.local_crops_size=30"], "28 or 42 would be"),
        (["student.pretrained_weights=/nowhere/w.pth"], "/nowhere/w.pth"),
        (["student.attention_backend=xformers"], "xformers"),
        (["train.unfreeze_last_n_blocks=9"], "exceeds the 4 blocks"),
        (["train.streaming_from_hf=false", "train.sample_list_path=/nowhere/list.txt"], "/nowhere/list.txt"),
    ],
)
def test_bad_input_is_one_sentence(shards: Path, tmp_path: Path, capsys, overrides: list[str], message: str):
    assert train(shards, tmp_path / "out", *overrides) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_output_folder_that_cannot_be_made(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("precious")
    assert train(shards, tmp_path / "file" / "out") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_weights_that_do_not_fit(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.save({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "w.pth")
    assert train(shards, tmp_path / "out", f"student.pretrained_weights={tmp_path / 'w.pth'}") == 2
    assert "patch_embed.proj.weight" in capsys.readouterr().err


def test_frozen_blocks_do_not_move(shards: Path, tmp_path: Path):
    assert train(shards, tmp_path / "out", "train.unfreeze_last_n_blocks=1", "optim.early_stop=0.75") == 0
    tensors = checkpoint_tensors(tmp_path / "out", 3)
    torch.manual_seed(0)
    assert not any("blocks.0" in key for key in tensors if "optimizer" in key)
    assert any("blocks.3" in key for key in tensors if "optimizer" in key)


def test_a_doctored_checkpoint_cannot_run_code(finished: Path, tmp_path: Path, shards: Path, capsys):
    """Metadata that names a foreign callable is refused instead of executed."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    output_dir = shutil.copytree(finished, tmp_path / "out")
    newest = output_dir / "checkpoints/step_0000008"
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    seal(newest)  # whoever doctors a file has its checksum, too
    assert train(shards, output_dir) == 2
    assert not (tmp_path / "pwned").exists()
    assert "not checkpoint data" in capsys.readouterr().err


def test_resuming_as_another_run_is_asked_about(shards: Path, finished: Path, tmp_path: Path, capsys):
    output_dir = shutil.copytree(finished, tmp_path / "out")
    changes = ("optim.base_lr=0.002", "dino.kde_loss_weight=0.1", "optim.early_stop=2", "train.batch_size_per_gpu=4")
    assert train(shards, output_dir, *changes) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if " E " in line]
    assert all(part in error for part in ("optim.base_lr was 0.01", "0.002", "dino.kde_loss_weight was 0.05"))
    assert "early_stop" not in error and "batch_size" not in error
    assert train(shards, output_dir, *changes, "train.allow_changes=true") == 0
    said = capsys.readouterr().err
    assert "was 8" not in said and "batch of 8 images" in said


def test_secrets_reach_no_file_and_no_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A token in the address of weights, and a folder that the environment names, through a run and its resume."""
    served = tmp_path / "served"
    served.mkdir()
    arch = SSLMetaArch(load_config(None, TINY))
    torch.save({"teacher": arch.teacher.state_dict()}, served / "w.pth")
    shutil.copytree(shards, tmp_path / "FOLDERFOLDER")
    monkeypatch.setenv("DATA_FOLDER", str(tmp_path / "FOLDERFOLDER"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    output_dir = tmp_path / "out"
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=served)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/w.pth?token=TOKENTOKEN"
        line = ["--output-dir", str(output_dir), *TINY, "data.path=${oc.env:DATA_FOLDER}"]
        line.append(f"student.pretrained_weights={url}")
        assert main([*line, "optim.early_stop=1"]) == 0
        assert main(line) == 0
        server.shutdown()
    said = "".join(capfd.readouterr())
    written = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    assert not [path for path in (tmp_path / "cache").rglob("*TOKENTOKEN*")]
    assert output_dir / "eval/training_8/teacher_checkpoint.json" in written
    for secret in ("TOKENTOKEN", "FOLDERFOLDER"):
        assert secret not in said.replace(str(output_dir), "")
        assert not [path for path, content in written.items() if secret.encode() in content]
    assert b"${oc.env:DATA_FOLDER}" in written[output_dir / "config.yaml"]
