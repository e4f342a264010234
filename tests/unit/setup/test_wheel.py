"""What `pip install .` carries beside the library."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_wheel_carries_scripts_configurations_and_the_driver(tmp_path):
    pytest.importorskip("setuptools")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "pathfm = dinov2.command:main" in scripts
    carried = [ROOT / "HEST_evaluation.py", *(ROOT / "eval_configs").glob("*.yaml")]
    carried += [*(ROOT / "prepatching_scripts").rglob("*.py"), *(ROOT / "dinov2/configs").rglob("*.yaml")]
    assert {path.relative_to(ROOT).as_posix() for path in carried} <= names
