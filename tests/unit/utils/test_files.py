"""Files that are whole or absent, whatever ends the process that writes them."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dinov2.utils.files import (
    check_description,
    commit,
    leftovers,
    locked,
    replacing,
    unfinished,
    write_json,
    write_new,
    write_text,
)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in another process."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path: Path):
    result = run(
        """
        import resource, sys
        from pathlib import Path
        from dinov2.utils.files import write_text
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_text(Path(sys.argv[1]), "x" * 1000)
        except OSError as error:
            sys.exit(str(error))
        """,
        tmp_path / "a.json",
    )
    assert str(tmp_path / "a.json") in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file_and_a_recognisable_remainder(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    result = run(
        """
        import os, signal, sys
        from pathlib import Path
        from dinov2.utils.files import replacing
        with replacing(Path(sys.argv[1])) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [name for name, _ in leftovers(tmp_path)] == ["a.json"]


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[tuple[str, bool]] = []
    path = tmp_path / "a.txt"
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append((os.readlink(f"/proc/self/fd/{fd}"), path.exists())), sync(fd))
    )
    write_text(path, ["a\n", "b\n"])
    assert path.read_text() == "a\nb\n"
    (first, named_before), (last, named_after) = events[0], events[-1]
    assert Path(first).parent == tmp_path and not named_before
    assert Path(last) == tmp_path and named_after  # the folder's entry too


def test_of_several_files_none_gets_its_name_when_one_fails(tmp_path: Path):
    weights, record = tmp_path / "weights", tmp_path / "record"
    with pytest.raises(OSError), replacing(weights, record) as (first, _):
        first.write_text("weights")  # the second is never written
    assert list(tmp_path.iterdir()) == []


def test_unfinished_file_that_is_not_committed_vanishes(tmp_path: Path):
    with unfinished(tmp_path / "a") as partial:
        partial.write_text("x")
    assert list(tmp_path.iterdir()) == []
    with unfinished(tmp_path / "a") as partial:
        partial.write_text("x")
        commit(partial, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "x"


def test_new_files_do_not_replace_those_of_the_user(tmp_path: Path):
    contents = {tmp_path / "list": ["a\n"], tmp_path / "list.json": ["{}\n"]}
    (tmp_path / "list.json").write_text("mine")
    with pytest.raises(FileExistsError):
        write_new(contents)
    assert (tmp_path / "list.json").read_text() == "mine" and not (tmp_path / "list").exists()
    (tmp_path / "list.json").write_text("{}\n")
    write_new(contents)
    assert (tmp_path / "list").read_text() == "a\n" and len(list(tmp_path.iterdir())) == 2


def test_undecodable_file_names_survive(tmp_path: Path):
    name = b"slide\xff.svs".decode(errors="surrogateescape")
    write_text(tmp_path / "list", name)
    assert (tmp_path / "list").read_bytes() == b"slide\xff.svs"


def test_lock_is_exclusive_between_processes_and_goes_with_its_holder(tmp_path: Path):
    path = tmp_path / "lock"
    program = """
        import sys
        from pathlib import Path
        from dinov2.utils.files import locked
        try:
            with locked(Path(sys.argv[1]), *map(int, sys.argv[2:])):
                pass
        except FileExistsError as error:
            sys.exit(str(error))
        """
    with locked(path, 0, 4):
        taken, free = run(program, path, 3, 2), run(program, path, 4, 2)
    assert taken.returncode == 1 and str(tmp_path) in taken.stderr
    assert free.returncode == 0, free.stderr
    assert run(program, path, 0, 4).returncode == 0


def test_folder_is_locked_without_a_file_in_it(tmp_path: Path):
    program = "import sys, pathlib, dinov2.utils.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): pass"
    with locked(tmp_path):
        assert run(program, tmp_path).returncode == 1
    assert run(program, tmp_path).returncode == 0 and not list(tmp_path.iterdir())


def test_empty_range_locks_nothing(tmp_path: Path):
    program = "import sys, pathlib, dinov2.utils.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): pass"
    with locked(tmp_path / "lock", 0, 0):
        assert run(program, tmp_path / "lock").returncode == 0


@pytest.mark.parametrize("found", ["{", "[]", "{}", '{"build": 3}'])
def test_description_that_describes_nothing_is_refused(tmp_path: Path, found: str):
    (tmp_path / "d.json").write_text(found)
    with pytest.raises(FileExistsError):
        check_description(tmp_path / "d.json", {"rows": 3})


def test_description_is_compared_key_by_key(tmp_path: Path):
    path = tmp_path / "d.json"
    assert not check_description(path, {"rows": 3})
    write_json(path, {"build": {"rows": 3}})
    assert check_description(path, {"rows": 3})
    write_json(path, {"build": {"scale": (0.1, 0.5), "crops": {"sides": (48, 24)}}})
    assert check_description(path, {"scale": (0.1, 0.5), "crops": {"sides": (48, 24)}})
    with pytest.raises(FileExistsError):
        check_description(path, {"scale": (0.1, 0.4), "crops": {"sides": (48, 24)}})
    write_json(path, {"build": {"rows": 3}})
    for other in ({"rows": 4}, {"rows": 3, "seed": 0}, {}):
        with pytest.raises(FileExistsError):
            check_description(path, other)
