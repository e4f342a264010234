"""The command `pathfm`: every name leads to its command, and every help ends in command lines that hold."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.command import COMMANDS, main
from tests.helpers.commands import ROOT


def test_every_command_is_listed(capsys: pytest.CaptureFixture):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == listed
    expected = {
        "train",
        "tiles",
        "pack",
        "inspect",
        "stats",
        "repack",
        "embed",
        "probe",
        "export",
        "compare",
        "report",
        "eva",
        "hest",
        "demo",
    }
    assert {name.split()[0] for name in COMMANDS} >= expected
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main(["tiles"]) == 0
    assert " pack " not in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("eva", "demo")])
def test_examples_of_the_help(name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    seen, parse = [], argparse.ArgumentParser.parse_known_args

    def watched(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
        seen.append(self)
        return parse(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", watched)
        main([*name.split(), "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[0].startswith(f"usage: pathfm {name} ")
    examples = lines[lines.index("examples:") + 1 :]
    assert examples
    for line in examples:
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["pathfm", *name.split()]
        assert seen[0].parse_known_args(words[1 + len(name.split()) :])[1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_do_not_wait_for_torch(name: str):
    code = f"""
import sys
from dinov2.command import main
for word, expected in (("--help", 0), ("--no-such-option", 2)):
    try:
        status = main([*{name.split()!r}, word])
    except SystemExit as end:
        status = end.code
    assert status == expected, (word, status)
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("words", "meant"), [(["tran"], "train"), (["tiles", "cutt"], "tiles cut")])
def test_a_misspelt_command_names_the_nearest(words: list[str], meant: str, capsys: pytest.CaptureFixture):
    assert main(words) == 2
    assert f" {meant}?" in capsys.readouterr().err


def test_arguments_and_status_are_handed_on(tmp_path, capsys: pytest.CaptureFixture):
    assert main(["train", "--config-file", str(tmp_path / "absent.yaml")]) == 2
    assert main(["tiles", "index", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]) == 2
    assert main(["demo", "further"]) == 2


def test_ctrl_c_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov2.command.demo", interrupted)
    assert main(["demo"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("torch", ["-m", "dinov2.eval.probe", "--checkpoint", "t.pth", "--data", "tiles"]),
        ("numpy", [str(ROOT / "dinov2/train/train.py"), "--config-file", "demo"]),
    ],
)
def test_ctrl_c_while_libraries_are_imported(tmp_path: Path, library: str, line: list[str]):
    """A stand-in for one that is interrupted as it is imported."""
    (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt\n")
    line = [sys.executable, *line]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("line", [["dinov2/train/train.py"], ["-m", "dinov2.report"], ["-m", "dinov2.data.inspect"]])
def test_another_python_names_the_one_to_use(line: list[str]):
    without_packages = [sys.executable, "-S", *line, "--help"]
    result = subprocess.run(without_packages, cwd=ROOT, env={}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert str(ROOT / ".venv/bin/python") in result.stderr
    assert len(result.stderr.splitlines()) == 1
