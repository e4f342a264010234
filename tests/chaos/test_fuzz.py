"""Files with random damage are trained on, or refused in a sentence: no traceback, no crash, no hang."""

from __future__ import annotations

import faulthandler
import random
import shutil
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dinov2.configs import public_config
from dinov2.train.train import main
from prepatching_scripts.make_demo_slide import make_demo_slides
from tests.helpers.runs import TINY, write_tissue_shards
from tests.helpers.training import tiny_config

BATCH = 10  # files of one test
PATIENCE_S = 300
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1e-9, 0.5, 1e30, -1e30, float("nan"), float("inf"), 2**31, 2**63, 10**40),
    *("", " ", "x", "0", "-1", "nan", "1e400", "true", "ünïcödé", "../..", "/", "~", "a b", "\x00", "{}", "[", "%s"),
    *("${oc.env:NOWHERE}", "${student.arch}", "???", "a" * 5000, [], [[]], [1, 2], ["x"], {}, {"a": 1}, {1: {2: 3}}),
)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End the process where a file takes for ever."""
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def assert_answered(capsys: pytest.CaptureFixture, *arguments: str) -> None:
    """Status 0, or 2 with one line that says why."""
    capsys.readouterr()
    status = main(arguments)
    said = capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in said, (arguments, said)
    assert status == 0 or said.rstrip().splitlines()[-1].strip(), arguments


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with some bytes replaced, taken out or put in, or cut off, mostly near one of the ends."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 50))):
        if not data:
            break
        at = draw.choice((draw.randrange(len(data)), min(draw.randrange(400), len(data) - 1), -draw.randrange(1, 400)))
        at %= len(data)
        match draw.randrange(6):
            case 0 | 1 | 2:
                data[at] = draw.choice((0, 255, draw.randrange(256)))
            case 3:
                del data[at : at + draw.choice((1, 4, 1000))]
            case 4:
                data[at:at] = draw.randbytes(draw.choice((1, 4, 1000)))
            case 5:
                data[at : at + 8] = draw.choice((b"\xff" * 8, b"\x00" * 8, draw.randbytes(8)))
    return bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.1 else data)


def with_odd_values(config: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """A configuration with some values, or whole sections, that are something else."""
    changed = {
        key: with_odd_values(value, draw) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    for key in draw.sample(sorted(changed), k=min(len(changed), draw.choice((0, 0, 0, 1, 1, 2)))):
        changed[key] = draw.choice(VALUES)
    if draw.random() < 0.05:
        changed["".join(draw.choices(string.ascii_letters, k=3))] = draw.choice(VALUES)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_configurations(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, seed: int):
    draw, file = random.Random(seed), tmp_path / "config.yaml"
    known = public_config(tiny_config(f"data.path={data}"))
    for at in range(BATCH):
        if at % 2:
            file.write_bytes(damaged(OmegaConf.to_yaml(OmegaConf.create(known)).encode(), draw))
        else:
            file.write_text(OmegaConf.to_yaml(OmegaConf.create(with_odd_values(known, draw))))
        assert_answered(capsys, "--config-file", str(file), "--output-dir", str(tmp_path / "out"), "--dry-run")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture, seed: int):
    draw, shards = random.Random(seed), write_tissue_shards(tmp_path / "shards", shards=1)
    (path,) = shards.glob("*.parquet")
    content = path.read_bytes()
    train = (*TINY, f"data.path={shards}", "optim.early_stop=1", "train.skip_checkpointer=true")
    for at in range(BATCH):
        path.write_bytes(damaged(content, draw))
        assert_answered(capsys, "--output-dir", str(tmp_path / f"out{at}"), *train)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("make", ["demo", "jpeg", "jpeg2000"])
def test_slides(tmp_path: Path, capsys: pytest.CaptureFixture, request: pytest.FixtureRequest, seed: int, make: str):
    draw = random.Random(seed)
    slide = make_demo_slides(tmp_path / "demo")[0] if make == "demo" else request.getfixturevalue(f"{make}_slide")
    content, folder = slide.read_bytes(), tmp_path / "slides"
    folder.mkdir()
    train = (*TINY, "data.kind=slides", f"data.path={folder}", "data.tile_size=64", "optim.early_stop=1")
    train += ("train.skip_checkpointer=true", "online.mpp=[0.5]")
    for at in range(BATCH):
        (folder / slide.name).write_bytes(damaged(content, draw))
        assert_answered(capsys, "--output-dir", str(tmp_path / f"out{at}"), *train)
        shutil.rmtree(tmp_path / f"out{at}", ignore_errors=True)
