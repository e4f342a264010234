"""Disks that fill up while a run writes, and bits that turn over on them."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.hub import load_teacher
from dinov2.train.train import main
from tests.helpers.checkpoints import flip
from tests.helpers.launches import LAUNCHED, STEPS, assert_equal_runs
from tests.helpers.runs import TINY

DISK_MIB = 64
EXPORTS = ("evaluation.eval_period_iterations=4", "evaluation.keep_exports=2")


def train(data: Path, output_dir: Path, *overrides: str) -> int:
    return main(["--output-dir", str(output_dir), *TINY, *LAUNCHED, f"data.path={data}", *EXPORTS, *overrides])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train(data, output_dir) == 0
    return output_dir


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "once there are checkpoints"])
@pytest.mark.parametrize("kib", range(0, 6001, 500))
def test_a_disk_with_little_room(
    data: Path, whole: Path, disk: Path, capsys: pytest.CaptureFixture, kib: int, begun: bool
):
    output_dir, filler = disk / "out", disk / "filler"
    if begun:
        assert train(data, output_dir, "optim.early_stop=2") == 0
    before = {path: path.read_bytes() for path in output_dir.glob("checkpoints/step_*/*")}
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - (kib << 10)))
    capsys.readouterr()
    status, said = train(data, output_dir), capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in said, said
    if status == 2:
        assert "disk" in said or "room" in said or "free" in said or "space" in said, said
        kept = {path: path.read_bytes() for path in output_dir.glob("checkpoints/step_*/*")}
        newest = max((path.parent for path in before), default=None)
        assert newest is None or all(kept.get(path) == before[path] for path in before if path.parent == newest)
    filler.unlink()
    assert train(data, output_dir) == 0
    assert_equal_runs(whole, output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit(data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture, seed: int):
    """Of the newest checkpoint: the run goes on from the one before. Of an export: it does not load."""
    draw, output_dir = random.Random(seed), tmp_path / "out"
    shutil.copytree(whole, output_dir)
    newest, export = output_dir / f"checkpoints/step_{STEPS:07d}", output_dir / f"eval/training_{STEPS}"
    files = [*sorted(newest.iterdir()), *sorted(export.glob("teacher_checkpoint.*"))]  # not the card beside
    path = files[seed % len(files)]
    flip(path, draw.randrange(8 * path.stat().st_size))
    if path.parent == export:
        with pytest.raises(ValueError):
            load_teacher(export / "teacher_checkpoint.pth")
        return
    assert train(data, output_dir) == 0
    assert newest.with_suffix(".corrupt").is_dir() and str(newest) in capsys.readouterr().err
    assert_equal_runs(whole, output_dir)
