"""Sample lists: what a line may be, and what is said of one that is malformed."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.slides.find import locate
from dinov2.data.slides.sample_list import read_sample_list


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_list_with_spaces_comments_and_blank_lines(tmp_path: Path) -> None:
    samples = read_sample_list(
        write(
            tmp_path / "list",
            "# made by hand",
            "/a b/c 1 2.svs 10 20 0",
            "",
            "  x.svs\t5 6 1 ",
            "/a b/c 1 2.svs 7 8 2",
        )
    )
    assert samples.slides == ["/a b/c 1 2.svs", "x.svs"]
    rows = zip(samples.slide, samples.x, samples.y, samples.level, strict=True)
    assert [tuple(map(int, row)) for row in rows] == [(0, 10, 20, 0), (1, 5, 6, 1), (0, 7, 8, 2)]


@pytest.mark.parametrize(
    "line",
    ["a.svs 1 2", "a.svs 1 2 x", "a.svs 1.5 2 0", "a.svs -1 2 0", "1 2 0", "a.svs 1 2 9999999999", "a.svs"],
)
def test_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "list", "# head", "a.svs 1 2 0", line)
    with pytest.raises(ValueError, match=r"Line 3 of sample list .* three whole numbers x y level") as caught:
        read_sample_list(path)
    assert line in str(caught.value) and str(path) in str(caught.value)


def test_six_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "list", "/a 1 2/s.svs 10 20 0 0.5 0.5", "b.svs 5 6 1  1 1.01 ", "/a 1 2/s.svs 0 0 0 2 2")
    samples = read_sample_list(path, columns=6)
    assert samples.slides == ["/a 1 2/s.svs", "b.svs"] and samples.slide.tolist() == [0, 1, 0]
    assert samples.x.tolist() == [10, 5, 0] and samples.level.tolist() == [0, 1, 0]
    np.testing.assert_allclose(samples.mpp, [0.5, 1.005, 2], rtol=1e-6)
    assert samples.mpp.dtype == np.float32
    describe(path, ["path", "x", "y", "level", "mpp_x", "mpp_y"])
    assert read_sample_list(path).digest() == read_sample_list(path, columns=4).digest() == samples.digest()
    write(path, *path.read_text().replace("2 2\n", "1 1\n").splitlines())
    assert read_sample_list(path).digest() != samples.digest()


def describe(path: Path, columns: object) -> None:
    Path(f"{path}.meta.json").write_text(json.dumps({"columns": columns}))


def test_four_columns_whose_paths_look_like_six(tmp_path: Path) -> None:
    path = write(tmp_path / "list", "/x/slide 3 4 0 1 1", "/x/slide 3 4 0 1 2")
    describe(path, ["path", "x", "y", "level"])
    samples = read_sample_list(path, columns=6)
    assert samples.slides == ["/x/slide 3 4"] and samples.mpp is None
    assert samples.level.tolist() == [1, 2] and samples.y.tolist() == [1, 1]


@pytest.mark.parametrize("line", ["a.svs 1 2 0 0.5 0.51", "a.svs 1 2 0 0 0", "a.svs 1 2 0 nan nan", "a 1 2 0 0.5",
                                  "a.svs 1 2 0 inf inf", "a.svs 1 2.5 0 1 1", "a.svs 1 2 0 x 1"])  # fmt: skip
def test_malformed_six_columns_are_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "list", *["a.svs 1 2 0 1 1"] * 17_000, line)
    with pytest.raises(ValueError, match=r"Line 17001 of sample list .* mpp_x and|mpp_x mpp_y above 0"):
        read_sample_list(path, columns=6)


def test_columns_that_no_list_has(tmp_path: Path) -> None:
    path = write(tmp_path / "list", "a.svs 1 2 0")
    describe(path, ["path", "x"])
    with pytest.raises(ValueError, match=r"meta.json' names the columns \['path', 'x'\], but they must be"):
        read_sample_list(path)
    Path(f"{path}.meta.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"meta.json' does not describe a sample list"):
        read_sample_list(path)


def test_long_lists_are_read_across_chunks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, [40, 2**31, 2**31, 9], (40_000, 4))
    lines = (f"/s \udcff{slide}.svs {x} {y} {level}" for slide, x, y, level in rows.tolist())
    path = tmp_path / "list"
    path.write_text("# head\n" + "\n".join(lines), errors="surrogateescape")
    samples = read_sample_list(path)
    assert [samples.slides[i] for i in samples.slide] == [f"/s \udcff{slide}.svs" for slide in rows[:, 0]]
    np.testing.assert_array_equal(np.stack([samples.x, samples.y, samples.level], 1), rows[:, 1:])
    assert {column.dtype for column in (samples.slide, samples.x, samples.y, samples.level)} == {np.dtype("int32")}


def test_missing_and_empty_lists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no sample list"):
        read_sample_list(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no tile"):
        read_sample_list(write(tmp_path / "list", "# nothing", ""))


def test_digest_sees_tiles_and_order_not_comments(tmp_path: Path) -> None:
    def digest(*lines: str) -> str:
        return read_sample_list(write(tmp_path / "list", *lines)).digest()

    base = digest("a.svs 1 2 0", "b.svs 3 4 1")
    assert digest("# comment", "a.svs  1 2 0", "", "b.svs 3 4 1") == base
    others = [
        digest("b.svs 3 4 1", "a.svs 1 2 0"),
        digest("a.svs 1 2 0", "b.svs 3 5 1"),
        digest("a.svs 1 2 0", "c.svs 3 4 1"),
        digest("a.svs 1 2 0", "a.svs 3 4 1"),
        digest("a.svs 1 2 0"),
    ]
    assert len({base, *others}) == 6


def test_relative_paths_are_relative_to_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lists/a.svs", "here/a.svs", "here/b.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    found = [locate(name, tmp_path / "lists/list.txt") for name in ("a.svs", "b.svs", "c.svs")]
    assert found == [str(tmp_path / name) for name in ("lists/a.svs", "here/b.svs", "lists/c.svs")]


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfa b.svs 1 2 0\r\nc.svs 3 4 1\r\n", b'"a b.svs" 1 2 0\n"c.svs" 3 4 1\n']
)
def test_byte_order_marks_quotes_and_line_ends_do_not_matter(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    found = read_sample_list(tmp_path / "list.txt")
    assert found.slides == ["a b.svs", "c.svs"] and found.x.tolist() == [1, 3] and found.level.tolist() == [0, 1]
    plain = tmp_path / "plain.txt"
    plain.write_text("a b.svs 1 2 0\nc.svs 3 4 1\n")
    assert found.digest() == read_sample_list(plain).digest()
