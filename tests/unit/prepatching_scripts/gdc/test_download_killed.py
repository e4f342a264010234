"""Downloads that are killed or interrupted, and the next run."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prepatching_scripts.download_tcga import main
from tests.helpers.gdc_server import Fault
from tests.unit.prepatching_scripts.gdc.conftest import CONTENT, HALF, failures, size_of, write_manifest


def run_cli(argv: list[str]) -> None:
    """The command line in a process of a terminal: what a shell starts in the background ignores interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(argv))


@pytest.fixture
def start_cli() -> Iterator[Callable[[list[str]], multiprocessing.Process]]:
    """Start the command line in processes that have its imports behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepatching_scripts.download_tcga", "httpx", "tqdm", "tenacity"])
    started = []

    def start(argv: list[str]) -> multiprocessing.Process:
        started.append(context.Process(target=run_cli, args=(argv,)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_kill_and_go_on_with_the_missing_bytes(server, slide, start_cli, cli, tmp_path: Path):
    manifest, out = write_manifest(tmp_path / "m.txt", [slide]), tmp_path / "out"
    argv = ["--manifest", str(manifest), "--output", str(out), "--endpoint", server.url]
    server.faults[slide.id] = [Fault("stall")]
    process = start_cli(argv)
    part = out / slide.id / f"{slide.name}.part"
    wait_for(lambda: size_of(part) == HALF)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / slide.id / slide.name).exists()
    assert server.bytes_sent[slide.id] == HALF
    assert cli("--manifest", str(manifest)) == 0
    assert server.ranges[slide.id] == ["", f"bytes={HALF}-"]
    assert server.bytes_sent[slide.id] == len(CONTENT)
    assert (out / slide.id / slide.name).read_bytes() == CONTENT


def test_kills_at_random_moments(server, start_cli, tmp_path: Path):
    stored = [server.add(f"{i}.svs", CONTENT[i:]) for i in range(4)]
    manifest, out = write_manifest(tmp_path / "m.txt", stored), tmp_path / "out"
    # 0.8 MB in about 0.75 s, so that a kill hits the middle of something
    argv = ["--manifest", str(manifest), "--output", str(out), "--endpoint", server.url, "--limit-mbps", "5"]
    generator, kills = random.Random(0), 0
    while (process := start_cli(argv)) and kills < 8:
        process.join(timeout=generator.uniform(0.0, 0.3))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        for i, file in enumerate(stored):  # what has its name is whole
            target = out / file.id / file.name
            assert not target.exists() or target.read_bytes() == CONTENT[i:]
    process.join(timeout=20)
    assert (kills > 0, process.exitcode) == (True, 0)
    for i, file in enumerate(stored):
        assert (out / file.id / file.name).read_bytes() == CONTENT[i:]
    assert not list(out.rglob("*.part"))


def test_interrupt_ends_cleanly_and_keeps_what_came(server, slide, start_cli, cli, tmp_path: Path, capfd):
    manifest, out = write_manifest(tmp_path / "m.txt", [slide]), tmp_path / "out"
    server.faults[slide.id] = [Fault("stall")]
    process = start_cli(["--manifest", str(manifest), "--output", str(out), "--endpoint", server.url])
    part = out / slide.id / f"{slide.name}.part"
    wait_for(lambda: size_of(part) == HALF)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=20)
    assert process.exitcode == 130
    assert size_of(part) == HALF
    assert failures(tmp_path) == []
    assert cli("--manifest", str(manifest)) == 0
    assert server.bytes_sent[slide.id] == len(CONTENT)


def test_what_a_killed_run_left_is_swept_and_nothing_else(server, slide, cli, tmp_path: Path):
    manifest, out = write_manifest(tmp_path / "m.txt", [slide]), tmp_path / "out"
    out.mkdir()
    left, theirs = (out / f".{name}.{'0a' * 16}.part" for name in ("failures.jsonl", "notes.txt"))
    left.touch()
    theirs.touch()
    assert cli("--manifest", str(manifest)) == 0
    assert (left.exists(), theirs.exists()) == (False, True)
