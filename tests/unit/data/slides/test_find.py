"""One finder for all tools: hidden files, relative paths, slides that are named twice, tables, URLs."""

import os
from pathlib import Path

import pytest

from dinov2.data.slides.find import SlideRow, find_slides, locate
from dinov2.data.slides.resolution import MppTable


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_slides_are_listed_from_folders_texts_and_tables(tmp_path: Path) -> None:
    for name in ("b/2.TIFF", "a.svs", "notes.md", ".hidden.svs"):
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).touch()
    found = find_slides(tmp_path / "slides").slides
    assert found == [SlideRow(str(tmp_path / "slides" / name)) for name in ("a.svs", "b/2.TIFF")]
    text = tmp_path / "list.txt"
    text.write_text("# comment\n\n/x/with space.svs\ns3://bucket/y.svs\nslides/a.svs\n")
    assert sorted(row.path for row in find_slides(text).slides) == sorted([
        str(tmp_path / "slides/a.svs"), "/x/with space.svs", "s3://bucket/y.svs"])  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("slide,tumour,mpp\n/x/1.svs,2.5,0.25\n/x/0.svs,1,\n/x/2.svs,0,0.5\n")
    rows = find_slides(table, "tumour", mpp_table=MppTable({"0": 0.5}, {})).slides
    assert sorted(rows) == [SlideRow("/x/0.svs", 1.0, 0.5), SlideRow("/x/1.svs", 2.5, 0.25)]


@pytest.mark.parametrize(
    ("name", "content", "weight", "message"),
    [
        ("a.csv", "slide,w\nx,-1\n", "w", "'-1' in line 2 of .* is no number from 0"),
        ("a.csv", "slide,w\nx,nan\n", "w", "'nan' in line 2"),
        ("a.csv", "slide,mpp\nx,40\n", "", "'40' in line 2"),
        ("a.csv", "slide,w\nx,1\n", "weight", "'weight' is expected"),
        ("a.csv", "file\nx\n", "", "has the columns file"),
        ("a.csv", "slide,w\nx,0\n", "w", "holds no slide"),
        ("a.csv", "slide,w\nx,1\nx,2\n", "w", "lists slide '.*x' twice"),
        ("a.csv", "slide,w\n,1\n", "w", "empty in line 2"),
        ("a.txt", "#\n", "", "holds no slide"),
        ("a.txt", "x.svs\n", "w", "is no .csv file"),
    ],
)
def test_impossible_lists_are_refused(tmp_path: Path, name: str, content: str, weight: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_slides(tmp_path / name, weight)


def test_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        find_slides(tmp_path / "nowhere")


def keys(source: Path | str) -> dict[str, str]:
    return {row.path: row.key for row in find_slides(source).slides}


def test_hidden_files_and_folders_are_never_taken(tmp_path: Path) -> None:
    """macOS leaves `._x.svs` beside each slide on foreign disks; snapshots of file systems lie in hidden folders."""
    touch(tmp_path, "a.svs", "._a.svs", "deep/b.svs", "deep/._b.svs", ".snapshot/a.svs", "deep/.x/c.svs")
    assert keys(tmp_path) == {str(tmp_path / name): name for name in ("a.svs", "deep/b.svs")}


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_relative_paths_are_relative_to_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Only where there is no such file does one in the current directory count."""
    touch(tmp_path, "lists/both.svs", "lists/beside.svs", "here/both.svs", "here/current.svs")
    monkeypatch.chdir(tmp_path / "here")
    listed = tmp_path / "lists" / f"slides.{ending}"
    names = ["both.svs", "beside.svs", "current.svs", "neither.svs"]
    listed.write_text("\n".join(["path"] * (ending == "csv") + names))
    expected = [tmp_path / name for name in ("lists/both.svs", "lists/beside.svs", "here/current.svs")]
    assert list(keys(listed)) == [*map(str, expected), str(tmp_path / "lists/neither.svs")]
    assert list(keys(Path("../lists") / listed.name)) == list(keys(listed))
    assert locate("s3://b/x.svs", listed) == "s3://b/x.svs"


def test_a_file_that_several_paths_lead_to_counts_once(tmp_path: Path, caplog) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "b.svs").symlink_to(tmp_path / "a.svs")
    for name in ("list.txt", "list.csv"):
        (tmp_path / name).write_text("path\nb.svs\na.svs\nb.svs\n"[5 * (name == "list.txt") :])
        found = find_slides(tmp_path / name)
        assert [row.key for row in found.slides] == ["b.svs"]
        assert found.duplicates == [(str(tmp_path / name), str(tmp_path / "b.svs")) for name in ("a.svs", "b.svs")]
    assert "2 paths lead to slides that count already" in caplog.text
    assert [row.key for row in find_slides(tmp_path).slides] == ["a.svs"]


def test_one_slide_or_url_is_a_source(tmp_path: Path) -> None:
    touch(tmp_path, "one/slide.svs")
    assert keys(tmp_path / "one/slide.svs") == {str(tmp_path / "one/slide.svs"): "slide.svs"}
    assert keys("https://host/x/c.svs?key=y") == {"https://host/x/c.svs?key=y": "c.svs"}
    names = tmp_path / "names.txt"
    names.write_text("# slides\ns3://bucket/a.svs\n\n/local/b.svs\n")
    assert keys(names) == {"s3://bucket/a.svs": "a.svs", "/local/b.svs": "b.svs"}


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"The folder '.*locked' cannot be listed"):
        find_slides(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", b"beside.svs\n"),
        ("bom.txt", b"\xef\xbb\xbfbeside.svs\r\n"),
        ("bom_comment.txt", b"\xef\xbb\xbf# slides\r\nbeside.svs\r\n"),
        ("utf16.txt", "beside.svs\r\n".encode("utf-16")),
        ("quoted.txt", b'"beside.svs"\n'),
        ("single.txt", b"'beside.svs' \r\n"),
        ("apple.txt", b"._beside.svs\nbeside.svs\n"),
        ("url.txt", b"file://{folder}/beside.svs\n"),
        ("table.txt", b"path,mpp\nbeside.svs,0.5\n"),
        ("mpp.csv", b"path,mpp\nbeside.svs,0.5\n"),
        ("bom.csv", b'\xef\xbb\xbf"path", "mpp"\r\n"beside.svs", "0.5"\r\n'),
        ("semicolon.csv", b"mpp;slide\n0.5;beside.svs\n"),
        ("utf16.csv", "path\tmpp\r\nbeside.svs\t0.5\r\n".encode("utf-16")),
        ("trident.csv", b"wsi,mpp\nbeside.svs,0.5\n"),
        ("trident_apple.csv", b"wsi,mpp\n._beside.svs,0.5\nbeside.svs,0.5\n"),
        ("clam.csv", b"case_id,slide_id,label\nP-1,beside,tumor\n"),
        ("process_list_autogen.csv", b"slide_id,process,status,seg_level\nbeside.svs,1,tbp,-1\n"),
        ("capital.CSV", b"slide\nbeside.svs\n"),
        ("capitals.csv", b"Path,MPP\nbeside.svs,0.5\n"),
        ("comma.csv", b"path;mpp\nbeside.svs;0,5\n"),
        ("excel.csv", b"sep=;\r\npath;mpp\r\nbeside.svs;0.5\r\n"),
        ("commented.csv", b"# slides\n\npath,mpp\n#gone.svs,1\nbeside.svs,0.5\n"),
        ("mac.csv", b"path,mpp\rbeside.svs,0.5\r"),
        ("mac.txt", b"# slides\rbeside.svs\r"),
        ("column.txt", b"slide_id\nbeside\n"),
    ],
)
def test_lists_as_other_tools_and_editors_write_them(tmp_path: Path, monkeypatch, name: str, content: bytes) -> None:
    """Each names the one slide that lies beside it, wherever it is read from."""
    touch(tmp_path, "lists/beside.svs", "lists/._beside.svs", "here/beside.svs")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "lists" / name).write_bytes(content.replace(b"{folder}", bytes(tmp_path / "lists")))
    for source in (tmp_path / "lists" / name, Path("../lists") / name):
        [row] = find_slides(source).slides
        assert row.path == str(tmp_path / "lists/beside.svs")
        assert row.mpp == (0.5 if b"mpp" in content.lower() or "0.5" in content.decode("utf-16", "replace") else None)
        assert row.patient == ("P-1" if "clam" in name else "")


def test_names_with_blanks_commas_and_quotes(tmp_path: Path) -> None:
    names = ["a b.svs", "a,b.svs", "it's.svs", "ü.svs"]
    touch(tmp_path, *names)
    (tmp_path / "list.txt").write_text("\n".join(names))
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f'"{name}"' for name in names))
    for ending in ("txt", "csv"):
        assert list(keys(tmp_path / f"list.{ending}").values()) == names


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/z/a.svs", "outside/b.svs", "outside/deep/c.svs")
    (tmp_path / "in/a_link").symlink_to(tmp_path / "in/z")
    (tmp_path / "in/other").symlink_to(tmp_path / "outside")
    (tmp_path / "in/again").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/loop").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/.hidden").symlink_to(tmp_path / "outside")
    assert set(keys(tmp_path / "in").values()) == {"again/b.svs", "again/deep/c.svs", "z/a.svs"}


def test_entries_that_are_folders_stand_for_their_slides(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.svs", "x/deep/b.svs", "c.svs")
    (tmp_path / "list.csv").write_text("path,mpp\nx,0.25\nc.svs,0.5\n")
    found = {Path(row.path).name: row.mpp for row in find_slides(tmp_path / "list.csv").slides}
    assert found == {"a.svs": 0.25, "b.svs": 0.25, "c.svs": 0.5}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("TCGA-AA-0001-01Z-00-DX1", "uuid-1/TCGA-AA-0001-01Z-00-DX1.0a1b.svs"),  # the barcode before the first dot
        ("scan", "uuid-1/scan.ome.tif"),
        ("/data/TCGA/batch 1/a.svs", "batch 1/a.svs"),  # the longest tail
        ("/block/TCGA/b.svs", "uuid-1/b.svs"),  # the only slide of the name
        ("D:\\slides\\batch 1\\a.svs", "batch 1/a.svs"),
        ("b", "uuid-1/b.svs"),
        ("c.svs", "c.svs"),
        ("/data/twin.svs", "uuid-1/twin.svs"),  # two copies are one slide
        ("/data/nowhere.svs", "data/nowhere.svs"),
    ],
)
def test_slides_that_have_moved_are_found_below_a_root(tmp_path: Path, name: str, found: str) -> None:
    root = tmp_path / "mnt"
    touch(root, "batch 1/a.svs", "batch 2/a.svs", "uuid-1/b.svs", "c.svs", "uuid-1/twin.svs", "uuid-2/twin.svs")
    touch(root, "uuid-1/TCGA-AA-0001-01Z-00-DX1.0a1b.svs", "uuid-1/scan.ome.tif")
    for number in (1, 2):
        (root / f"uuid-{number}/twin.svs").write_bytes(b"twin")
        (root / f"batch {number}/a.svs").write_bytes(b"%d" % number)
    (tmp_path / "list.txt").write_text(name)
    assert [row.path for row in find_slides(tmp_path / "list.txt", slide_root=root).slides] == [str(root / found)]


def test_a_name_of_several_slides_below_a_root_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        touch(tmp_path / "mnt", f"{number}/a.svs")
        (tmp_path / f"mnt/{number}/a.svs").write_bytes(b"%d" % number)
    (tmp_path / "list.txt").write_text("/data/a.svs")
    with pytest.raises(ValueError, match=r"2 paths below .*mnt"):
        find_slides(tmp_path / "list.txt", slide_root=tmp_path / "mnt")


@pytest.mark.parametrize("name", ["not_read.vsi", "scan.isyntax", "nameless", "archive.zip"])
def test_a_file_that_is_no_slide_and_no_list_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"ZISRAWFILE" + bytes(range(256)) * 9)
    with pytest.raises(ValueError, match=r"not read|neither|no reader"):
        find_slides(tmp_path / name)


def test_an_image_is_a_slide_where_it_is_named_and_not_where_a_folder_is_searched(tmp_path: Path) -> None:
    for name in ("a.png", "b.svs", "c.czi"):
        (tmp_path / name).touch()
    assert [Path(row.path).name for row in find_slides(tmp_path).slides] == ["b.svs", "c.czi"]
    assert [Path(row.path).name for row in find_slides(tmp_path / "a.png").slides] == ["a.png"]


def test_an_image_is_listed_by_its_whole_name_only(tmp_path: Path) -> None:
    """A name without an ending stands for the slide, which a picture of it may lie beside."""
    touch(tmp_path, "lists/a.png", "lists/c.jp2", "mnt/deep/a.svs", "mnt/deep/b.png", "mnt/thumbnails/a.jpg")
    (tmp_path / "lists/list.csv").write_text("slide_id,mpp\na,0.5\nc.jp2,0.3\n/data/b.png,0.25\n")
    found = find_slides(tmp_path / "lists/list.csv", slide_root=tmp_path / "mnt").slides
    names = {Path(row.path).relative_to(tmp_path).as_posix(): row.mpp for row in found}
    assert names == {"mnt/deep/a.svs": 0.5, "lists/c.jp2": 0.3, "mnt/deep/b.png": 0.25}


@pytest.mark.parametrize("others", [["x.isyntax"], ["y.zarr/0/0.0", "y.zarr/.zattrs"]])
def test_formats_without_a_reader_are_named_in_a_folder(tmp_path: Path, caplog, others: list[str]) -> None:
    touch(tmp_path / "mixed", "a.svs", *others)
    touch(tmp_path / "only", *others)
    assert [row.key for row in find_slides(tmp_path / "mixed").slides] == ["a.svs"]
    shown = others[0].partition("/")[0]
    assert shown in caplog.text
    with pytest.raises(ValueError, match=shown):
        find_slides(tmp_path / "only")


def test_an_address_of_a_file_with_escaped_blanks(tmp_path: Path) -> None:
    touch(tmp_path, "b c.svs")
    (tmp_path / "list.txt").write_text(f"file://{tmp_path}/b%20c.svs\n")
    assert [row.path for row in find_slides(tmp_path / "list.txt").slides] == [str(tmp_path / "b c.svs")]


def test_an_mpp_table_that_names_no_slide_is_said_so(tmp_path: Path, caplog) -> None:
    touch(tmp_path, "a.svs")
    assert find_slides(tmp_path, mpp_table=MppTable({"a": 0.5}, {})).slides[0].mpp == 0.5 and not caplog.records
    find_slides(tmp_path, mpp_table=MppTable({"b": 0.5}, {}))
    assert len(caplog.records) == 1
