"""The page of a small run, in a browser too, and pages of folders where something is missing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.report.__main__ import main
from dinov2.train.train import main as train
from tests.helpers.browser import browser
from tests.helpers.runs import TINY, write_tissue_shards

SHEETS = ("crops.png", "pca.png", "attention.png", "neighbours.png")
PAGES = ("loss_curves.png", *SHEETS)
MOST_BYTES = 5_000_000


@pytest.fixture(scope="module")
def run_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that exported its teacher twice."""
    folder = tmp_path_factory.mktemp("report") / "run"
    overrides = (
        f"train.streaming_dataset_path={shards}",
        "optim.epochs=1",
        "evaluation.eval_period_iterations=3",
    )
    assert train(["--output-dir", str(folder), *TINY, *overrides]) == 0
    return folder


@pytest.fixture(scope="module")
def holdout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("holdout") / "shards", shards=1, rows=11)


@pytest.fixture(scope="module")
def report(run_folder: Path, holdout: Path) -> Path:
    assert main([str(run_folder), "--tiles", str(holdout), "--price", "2.5"]) == 0
    return run_folder / "report"


def test_drawings_and_embeddings(report: Path):
    for name in PAGES:
        with Image.open(report / name) as image:
            colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
            assert image.width > 600 and image.height > 250 and len(colours) > 50
    embeddings = np.load(report / "embeddings.npy")
    assert embeddings.shape == (11, 128)
    assert embeddings.dtype == np.float32 and np.isfinite(embeddings).all()


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_page_holds_everything_itself(report: Path, run_folder: Path):
    page = (report / "report.html").read_text()
    assert len(page.encode()) < MOST_BYTES
    body = without_scripts(page)
    embedded = re.findall(r'<img alt="([^"]+)" src="data:image/webp;base64,([^"]+)"', body)
    assert len(embedded) == len(SHEETS)
    for (alt, data), name in zip(embedded, SHEETS, strict=True):
        assert len(alt) > 20
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown, Image.open(report / name) as drawn:
            assert shown.size == drawn.size
    assert not re.search(r'(src|href)="(?!data:|#)', body) and "@import" not in body
    for text in ("dino local crops loss", "images per second", "RankMe", "training_4", "base_lr"):
        assert text in body
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"<td>{last['total_loss']:.4f}</td>" in body


def test_an_earlier_report_is_replaced_and_nothing_left_beside(report: Path, run_folder: Path):
    shutil.copytree(report, run_folder.parent / "copy" / "report")
    (run_folder.parent / "copy/report/crops.png").write_bytes(b"old")
    (run_folder.parent / "copy" / "config.yaml").symlink_to(run_folder / "config.yaml")
    assert main([str(run_folder.parent / "copy")]) == 0  # crops, of the training data, and no export
    assert (run_folder.parent / "copy/report/crops.png").read_bytes() != b"old"
    names = sorted(path.name for path in (run_folder.parent / "copy/report").iterdir())
    assert names == sorted([*PAGES, "embeddings.npy", "report.html"])


def test_training_tiles_serve_where_none_are_given(run_folder: Path, tmp_path: Path):
    assert main([str(run_folder), "--output", str(tmp_path / "new")]) == 0
    assert len(np.load(tmp_path / "new/embeddings.npy")) == 90
    assert "Embeddings of training tiles" in (tmp_path / "new/report.html").read_text()


def test_what_is_in_other_use_is_left_alone(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "mine.html").write_bytes(b"mine")
    for output in (tmp_path, tmp_path / "mine.html"):
        caplog.clear()
        assert main([str(run_folder), "--no-pictures", "--output", str(output)]) == 2
        assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]
    assert (tmp_path / "mine.html").read_bytes() == b"mine"


def test_missing_tiles_are_named(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert main([str(run_folder), "--tiles", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new")]) == 2
    assert "nowhere" in caplog.text
    assert not (tmp_path / "new").exists()


def page_of(output: Path, *arguments: Any) -> str:
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    return without_scripts(output.read_text())


def charts_of(page: str) -> list[str]:
    return re.findall(r'id="(chart-\d+)" role="img" aria-label="[^"]{20,}"', page)


def test_folders_where_something_is_missing_have_a_page_that_says_so(run_folder: Path, tmp_path: Path):
    started = tmp_path / "crashed in its first step"
    started.mkdir()
    shutil.copy(run_folder / "config.yaml", started)
    (tmp_path / "empty").mkdir()
    for folder in (started, tmp_path / "empty"):
        page = page_of(tmp_path / "page.html", folder)
        assert charts_of(page) == [] and 'id="missing"' in page
    torn = tmp_path / "torn"
    torn.mkdir()
    lines = (run_folder / "metrics.jsonl").read_text()
    (torn / "metrics.jsonl").write_text(lines[: len(lines) // 2])
    page = page_of(tmp_path / "page.html", torn)
    assert len(charts_of(page)) > 10 and 'id="missing"' in page


def test_runs_of_different_keys_and_versions_are_laid_over_each_other(run_folder: Path, tmp_path: Path):
    older = tmp_path / "<older> & <script>"
    older.mkdir()
    records = [{"step": n, "total_loss": 9.0 - n, "old_loss": 1.0, "lr": 0.1, "iteration": n} for n in range(1, 30)]
    (older / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (older / "config.yaml").write_text("optim: {base_lr: 7.5}\nno_longer: {known: 1}\n")
    page = page_of(tmp_path / "page.html", run_folder, older, tmp_path)
    alone = page_of(tmp_path / "page.html", run_folder, "--no-pictures")
    assert len(charts_of(page)) == len(charts_of(alone)) + 2
    assert "<older>" not in page and "&lt;older&gt;" in page
    assert "7.5" in page and "no_longer.known" in page


def test_where_nothing_can_be_written_beside_the_run_the_page_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "total_loss": 1.0}\n')
    (run / "report").write_bytes(b"a file where the folder would be")  # root may write everywhere else
    caplog.set_level("WARNING")
    assert main([str(run), "--no-pictures"]) == 0
    assert charts_of(without_scripts((tmp_path / "pathfm_report.html").read_text())) == ["chart-0"]
    assert (run / "report").read_bytes().startswith(b"a file")


def test_in_a_browser(report: Path, tmp_path: Path):
    """No error, every chart drawn, nothing wider than the window; and a zoom of one chart is one of all."""
    with browser() as chromium:
        for width, scheme in ((1280, "light"), (400, "dark")):
            page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error, said=said: said.append(f"error: {error}"))
            page.on("request", lambda request, said=said: said.append(request.url))
            page.goto((report / "report.html").as_uri(), timeout=300_000)  # on the busiest machine
            charts = page.locator(".chart")
            page.wait_for_function("document.querySelectorAll('.chart > *').length == "
                                   "document.querySelectorAll('.chart').length")  # fmt: skip
            page.locator(".chart canvas").last.wait_for()
            assert charts.count() > 20
            page.screenshot(path=tmp_path / f"report_{width}.png", full_page=True)
            for number in (0, charts.count() - 1):
                shown = charts.nth(number).locator("canvas").first
                assert shown.bounding_box()["width"] > 0.6 * min(width, 400)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("Array.from(document.images).every(image => image.naturalWidth > 0)")
            drawn = [charts.nth(number).screenshot() for number in (0, 3)]
            for picture in drawn:
                assert len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(1 << 20)) > 20
            if width == 1280:
                charts.nth(0).scroll_into_view_if_needed()
                box = charts.nth(0).bounding_box()
                page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
                page.mouse.down()
                page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
                page.mouse.up()
                page.wait_for_timeout(500)
                assert charts.nth(3).screenshot() != drawn[1]
            local = ("file:", "data:", "blob:", "log: [bokeh")
            assert [text for text in said if not text.startswith(local)] == []
            page.close()
