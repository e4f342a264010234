"""The benchmarks run; what they measure is not for tests."""

import json
from pathlib import Path

from benchmarks import bench_checkpoint, bench_data, bench_slides, bench_sources


def test_bench_data(tmp_path: Path, capsys) -> None:
    output = tmp_path / "results.json"
    assert bench_data.main(["--tiny", "--seconds", "0.05", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert {"cpu", "cores", "gpu", "versions", "commit", "date"} <= results["machine"].keys()
    for section in ("transform_ms", "reader"):
        assert all(value > 0 for value in results[section].values()), section
    assert results["seek"]["rows"] == 12 * 9500
    assert results["mixing"]["29_m_rows"]["slides_in_1_steps"] <= 384
    assert capsys.readouterr().out.count("\n") == 15  # a table of thirteen figures


def test_bench_slides(tmp_path: Path, capsys) -> None:
    output = tmp_path / "results.json"
    assert bench_slides.main(["--tiny", "--seconds", "0.05", "--output", str(output)]) == 0
    (slide,) = json.loads(output.read_text())["slides"].values()
    assert slide.pop("remote_patches_per_s") > 0
    assert all(rate > 0 for rates in slide.values() for rate in rates.values())
    assert capsys.readouterr().out.count("\n") == 6


def test_bench_sources(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert bench_sources.main(["--tiny", "--seconds", "0.01", "--output", str(output)]) == 0
    sources = json.loads(output.read_text())["sources"]
    assert sources.keys() == {"parquet", "images", "image_list", "tar", "zip", "hdf5", "slides", "sample_list"}
    assert all(0 < kind["read_cpu_ms"] < kind["batches_cpu_ms"] for kind in sources.values())


def test_bench_checkpoint(tmp_path: Path, capsys) -> None:
    output = tmp_path / "results.json"
    line = ["--arch", "vit_demo", "--repeats", "1", "--folder", str(tmp_path), "--output", str(output)]
    assert bench_checkpoint.main(line) == 0
    (found,) = json.loads(output.read_text())["checkpoints"].values()
    assert all(value > 0 for value in found.values())
    assert capsys.readouterr().out.count("\n") == 1
