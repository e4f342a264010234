"""Every kind of collection: recognised, read, ordered, resumed, split by patient, and replaced where corrupt."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dinov2.build.data import open_data, recognise
from dinov2.configs import load_config
from dinov2.data.inspect.__main__ import main as inspect
from dinov2.data.source import EncodedSample, Source, origins_of
from dinov2.data.stream.loader import DecodedRows
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from dinov2.train.train import main
from tests.helpers.collections import KINDS, SLIDES, tiles, write_collection
from tests.helpers.runs import TINY, read_metrics
from tests.helpers.shards import tile, tile_number

COUNT = 400  # several row groups of each slide
FILES = tiles(COUNT)


def opened(path: str, *overrides: str, cache: Path | None = None) -> Source:
    return open_data(load_config(None, [f"data.path={path}", *overrides]), cache).source


def rows_of(source: Source) -> list[tuple[str, np.ndarray]]:
    """Slide and pixels of every row, in the order in which they are stored."""
    found = []
    for group, rows in enumerate(source.group_rows.tolist()):
        for row, (slide, data) in enumerate(source.read(group, range(rows))):
            found.append((slide, source.decode(EncodedSample(0, group, row, slide, data))))
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(kind: str, tmp_path: Path) -> str:
    return write_collection(kind, tmp_path / "set", FILES)


def test_every_tile_is_read_once_with_its_slide(kind: str, path: str) -> None:
    assert recognise(path) == kind.partition("-")[0]
    source = opened(path)
    assert source.group_rows.max() <= 64 and source.group_rows.sum() == source.num_rows == COUNT
    rows = rows_of(source)
    assert sorted(tile_number(image) for _, image in rows) == list(range(COUNT))
    for slide, image in rows:
        number = tile_number(image)
        np.testing.assert_array_equal(image, tile(number))
        assert image.flags.writeable and slide.endswith(SLIDES[number % 5])


def test_rows_are_read_in_any_order_and_are_never_larger_than_said(path: str) -> None:
    source = opened(path)
    whole = source.read(1, range(int(source.group_rows[1])))
    assert source.read(1, [5, 0, 11]) == [whole[5], whole[0], whole[11]]
    assert sum(len(data) for _, data in whole) <= source.group_bytes[1]
    assert source.slides(1) == [slide for slide, _ in whole]
    assert source.describe(1, 5) != source.describe(1, 6)


def test_the_order_does_not_depend_on_how_a_disk_lists(
    kind: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(path)
    names = list(FILES) if kind in ("images", "image_list") else None
    random.Random(0).shuffle(names or [])
    moved = write_collection(kind, tmp_path / "moved", {name: FILES[name] for name in names} if names else FILES)
    real = os.scandir

    class Backwards:
        def __init__(self, folder: str) -> None:
            with real(folder) as entries:
                self._entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> Iterator[os.DirEntry]:
            return self._entries

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Iterator[os.DirEntry]:
            return self._entries

        def __next__(self) -> os.DirEntry:
            return next(self._entries)

    monkeypatch.setattr(os, "scandir", Backwards)
    other = opened(moved)
    assert other.fingerprint == source.fingerprint
    assert [tile_number(image) for _, image in rows_of(other)] == [tile_number(image) for _, image in rows_of(source)]


def test_a_changed_collection_has_another_fingerprint(kind: str, path: str, tmp_path: Path) -> None:
    fewer = write_collection(kind, tmp_path / "fewer", tiles(COUNT - 1))
    assert opened(fewer).fingerprint != opened(path).fingerprint


def samples(source: Source, start: int, count: int) -> list[EncodedSample]:
    order = SampleOrder(source.group_rows, seed=3, lanes=16, block_rows=64)
    reader = RankReader(source, order, global_batch=8, rank=0, world_size=1, start_sample=start)
    steps = iter(reader)
    found = [sample for step in islice(steps, count // 8) for sample in step]
    steps.close()
    return found


def test_a_stream_goes_on_from_any_sample(path: str) -> None:
    source = opened(path)
    whole = samples(source, 0, 800)
    assert samples(source, 400, 400) == whole[400:]
    numbers = Counter(tile_number(source.decode(sample)) for sample in whole)
    assert numbers == dict.fromkeys(range(COUNT), 2)


@pytest.mark.parametrize(
    "kind", ["tar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "tar")], indirect=True
)
def test_a_run_goes_on_where_it_was_stopped(kind: str, tmp_path: Path) -> None:
    path = write_collection(kind, tmp_path / "set", tiles(40, side=64))
    for name, stops in {"whole": [2], "parts": [1, 2]}.items():
        for stop in stops:
            options = [*TINY, f"data.path={path}", "data.validation_fraction=0.3", f"optim.early_stop={stop}"]
            assert main(["--output-dir", str(tmp_path / name), *options]) == 0
    losses = [[record["total_loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_corrupt_tiles_give_way_to_the_next_and_are_counted(kind: str, tmp_path: Path) -> None:
    files = dict(FILES)
    names = list(files)
    for number in (7, 8, 350):
        files[names[number]] = files[names[number]][:60]
    if kind == "hdf5":
        pytest.skip("pixels cannot be wrong, only their file")
    source = opened(write_collection(kind, tmp_path / "set", files))
    decoded = DecodedRows(source, lambda image, index: tile_number(image))
    seen = [decoded[sample] for sample in samples(source, 0, COUNT)]
    replaced = [sample for sample in seen if sample.replaced]
    assert len(replaced) == 3 and all(str(tmp_path) in sample.fault for sample in replaced)
    assert Counter(sample.crops for sample in seen).keys() == set(range(COUNT)) - {7, 8, 350}


def patient_of_name(slide: str) -> str:
    return slide.rpartition("/")[2][:12]


def test_patients_are_kept_for_validation_whole(path: str) -> None:
    data = open_data(load_config(None, [f"data.path={path}", "data.validation_fraction=0.5"]))
    patients = [slide[:12] for slide in SLIDES]
    held = {p for p in patients if int(hashlib.blake2b(p.encode(), digest_size=8).hexdigest(), 16) < 2**63}
    assert 0 < len(held) < 5
    for source, expected in ((data.source, set(patients) - held), (data.held_out[0], held)):
        found = {patient_of_name(SLIDES[tile_number(image) % 5]) for _, image in rows_of(source)}
        assert found == expected
        assert source.num_rows == len(expected) * COUNT // 5


def test_slides_are_excluded(path: str, tmp_path: Path) -> None:
    (tmp_path / "excluded.txt").write_text(f"{SLIDES[0][:12]}\n")
    source = opened(path, f"data.exclusion_file={tmp_path / 'excluded.txt'}")
    assert source.num_rows == COUNT * 4 // 5


def test_a_dataset_over_a_network_is_the_same(kind: str, path: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    folder = tmp_path / "set"
    for file in filter(Path.is_file, folder.rglob("*")):
        memory.pipe(f"/there/{kind}/{file.relative_to(folder)}", file.read_bytes())
    url = f"memory://there/{kind}" + path.removeprefix(str(folder))
    overrides = [f"data.kind={kind.partition('-')[0]}"]
    try:
        if kind.startswith("hdf5"):
            with pytest.raises(ValueError, match="local"):
                opened(url, *overrides)
            return
        here, there = opened(path), opened(url, *overrides)
        assert there.is_remote and there.fingerprint == here.fingerprint
        for group in range(len(here.group_rows)):
            rows = range(int(here.group_rows[group]))
            assert there.read(group, rows) == here.read(group, rows)
    finally:
        memory.rm("/there", recursive=True)


def test_inspect_tells_of_each_kind(kind: str, path: str, tmp_path: Path) -> None:
    assert inspect([path, "--batch", "8", "--ranks", "1", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kind"] == kind.partition("-")[0] and report["rows"] == COUNT
    assert report["slides"]["distinct"] == report["slides"]["patients"] == 5
    assert report["images"]["sizes"] == {"8x8": report["images"]["sampled"]}


def test_sites_of_a_list_are_excluded(tmp_path: Path) -> None:
    path = write_collection("image_list", tmp_path / "set", FILES)
    source = opened(path, "data.excluded_sites=[site 1]")
    assert {tile_number(image) % 2 for _, image in rows_of(source)} == {0}
    whole = opened(path)
    origins = [origin for group in range(len(whole.group_rows)) for origin in origins_of(whole, group)]
    assert {(origin.slide, origin.patient) for origin in origins} == {
        (f"files/{slide}", slide[:12]) for slide in SLIDES
    }
