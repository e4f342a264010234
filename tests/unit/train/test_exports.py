"""Retention of a run's exports, which never takes what came from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from huggingface_hub import ModelCard

from dinov2.eval.probe.results import Result, append_csv
from dinov2.export import save_teacher
from dinov2.models.vision_transformer import vit_demo
from dinov2.train.exports import LISTING, export_path, list_export, write_card


def make(output_dir: Path, step: int, keep: int, value: float = 0.0) -> Path:
    """Export a teacher as `Run.export_teacher` does."""
    path = export_path(output_dir, step)
    checksum = save_teacher(path, {"backbone": {"weight": torch.full((3,), step + value)}}, {"step": step})
    list_export(output_dir, step, checksum, keep)
    return path


def kept(output_dir: Path) -> set[int]:
    return {int(path.parent.name.removeprefix("training_")) for path in output_dir.glob("eval/*/*.pth")}


def test_all_are_kept_by_default(tmp_path: Path):
    paths = [make(tmp_path, step, keep=0) for step in (5, 10, 15)]
    assert kept(tmp_path) == {5, 10, 15}
    expected = [f"{xxhash.xxh3_128_hexdigest(path.read_bytes())}  {path.relative_to(tmp_path)}" for path in paths]
    assert (tmp_path / LISTING).read_text().splitlines() == expected


def test_the_newest_are_kept(tmp_path: Path):
    for step in (5, 10, 15, 20):
        make(tmp_path, step, keep=2)
    assert kept(tmp_path) == {15, 20}
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["training_15", "training_20"]


def test_made_again_after_a_resume(tmp_path: Path):
    for step in (5, 10, 5, 10):
        make(tmp_path, step, keep=2)
    assert kept(tmp_path) == {5, 10}
    with pytest.raises(FileExistsError):
        make(tmp_path, 10, keep=2, value=1)
    assert len((tmp_path / LISTING).read_text().splitlines()) == 2


def test_one_that_cannot_be_deleted_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = make(tmp_path, 5, keep=1)
    first.unlink()
    first.mkdir()  # as root, too, cannot unlink it
    second = make(tmp_path, 10, keep=1)
    assert first.exists() and second.exists()
    assert str(first) in caplog.text


def test_exports_from_elsewhere_stay(tmp_path: Path):
    """Copied in beside, or over one of the run's own; and files that lie beside an export."""
    other = tmp_path / "other"
    run = tmp_path / "run"
    for step in (1, 5):
        make(run, step, keep=0)
    for source, step in ((make(other, 3, keep=0), 3), (make(other, 5, keep=0, value=0.5), 5)):
        shutil.copytree(source.parent, run / "eval" / f"training_{step}", dirs_exist_ok=True)
    notes = run / "eval/training_1/notes.txt"
    notes.touch()
    for step in (8, 9):
        make(run, step, keep=1)
    assert kept(run) == {3, 5, 9} and notes.exists()


def test_a_damaged_list_ends_no_run(tmp_path: Path):
    make(tmp_path, 5, keep=1)
    (tmp_path / LISTING).write_bytes(b"\xd4" + (tmp_path / LISTING).read_bytes()[1:])
    make(tmp_path, 10, keep=1)
    assert kept(tmp_path) == {5, 10}  # what is not known to be the run's own stays
    make(tmp_path, 15, keep=1)
    assert kept(tmp_path) == {5, 15}


@pytest.mark.parametrize("line", ["", "x", f"{'0' * 32}  ../../elsewhere.pth", "\0"])
def test_foreign_lines_of_the_list_lead_nowhere(tmp_path: Path, line: str):
    elsewhere = tmp_path / "elsewhere.pth"
    elsewhere.touch()
    run = tmp_path / "a/run"
    make(run, 1, keep=0)
    (run / LISTING).write_text(f"{line}\n" + (run / LISTING).read_text())
    for step in (2, 3):
        make(run, step, keep=1)
    assert kept(run) == {3} and elsewhere.exists()


def test_cards_tell_of_the_run_and_go_with_their_exports(tmp_path: Path):
    append_csv(tmp_path / "eval/probes.csv", [Result("bach", "knn20", "balanced_accuracy", 0.5678, 0.5, 0.625)], 5)
    backbone = vit_demo(patch_size=14, img_size=42)
    for step in (5, 10):
        make(tmp_path, step, keep=0)
        write_card(tmp_path, step, backbone)
    cards = {step: export_path(tmp_path, step).with_name("README.md") for step in (5, 10)}
    first, second = (ModelCard.load(card) for card in cards.values())
    assert first.data.library_name == "path-fm" and "0.5678" in first.text and "0.5678" not in second.text
    sums = {line.split()[1]: line.split()[0] for line in (tmp_path / LISTING).read_text().splitlines()}
    assert sums["eval/training_5/README.md"] == xxhash.xxh3_128_hexdigest(cards[5].read_bytes())
    cards[10].write_text("gone over by hand")
    write_card(tmp_path, 10, backbone)
    for step in (15, 20):
        make(tmp_path, step, keep=1)
    assert kept(tmp_path) == {20} and not cards[5].parent.exists()
    assert cards[10].read_text() == "gone over by hand"


def test_a_card_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(tmp_path, 5, keep=0)
    (tmp_path / "eval/probes.csv").write_text("another,table\n")
    write_card(tmp_path, 5, vit_demo(patch_size=14, img_size=42))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not export_path(tmp_path, 5).with_name("README.md").exists()
