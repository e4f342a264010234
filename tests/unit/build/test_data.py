"""Kinds of data, what a run says about its stream, and how it keeps a commit."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.build import data as stream
from dinov2.build.data import open_data, recognise
from dinov2.configs import load_config
from dinov2.configs.fields import key
from dinov2.data.source import EncodedSample, SourceRequest, decode_image
from dinov2.data.stream.patient_split import is_used
from dinov2.train.plan.plan import make_plan
from dinov2.train.train import main
from tests.helpers.runs import TINY, read_metrics, write_tissue_shards
from tests.helpers.shards import encode, tile, write_dataset, write_published


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_shards(tmp_path_factory.mktemp("data") / "shards")


def described(shards: Path, *overrides: str) -> str:
    config = load_config(None, [*TINY, f"data.path={shards}", *overrides])
    plan, data = make_plan(config, 1), stream.open_data(config)
    return stream.describe_stream(config, plan, data, stream.order_parameters(config, plan, data))


def test_absurd_passes_are_warned_of(shards: Path) -> None:
    # 90 tiles; an epoch is 32 images.
    assert "warning   dataset" not in described(shards, "optim.epochs=840")  # 299 passes
    assert "302 passes over its 90 tiles" in described(shards, "optim.epochs=850")
    assert "warning   dataset" not in described(shards, "optim.epochs=3")  # 1.07 passes
    unseen = described(shards, "optim.epochs=2")  # 64 images
    assert unseen.count("warning   dataset") == 1 and "29%" in unseen


def test_tiles_smaller_than_the_crop_are_warned_of(shards: Path) -> None:
    assert "smaller" not in described(shards, "optim.epochs=3", "crops.global_crops_size=56")  # tiles of 64 px
    small = described(shards, "optim.epochs=3", "crops.global_crops_size=224", "crops.local_crops_size=98")
    (line,) = [line for line in small.splitlines() if "warning   dataset" in line]
    assert "64 x 64 px" in line and "crops.global_crops_size = 224" in line and "3.5 times" in line


def test_slides_and_tiles_are_restricted_by_keys(shards: Path) -> None:
    def data(*overrides: str) -> stream.OpenData:
        return stream.open_data(load_config(None, [*TINY, f"data.path={shards}", *overrides]))

    slides = {name for group in range(12) for name in data().source.slides(group)}
    used = {seed: {name for name in slides if is_used(name, 0.5, seed)} for seed in range(8)}
    seed = next(seed for seed in used if 0 < len(used[seed]) < 3)
    few = data("data.slide_fraction=0.5", f"train.seed={seed}")
    assert {name for group in range(12) for name in few.source.slides(group)} == used[seed]
    assert few.num_tiles == 30 * len(used[seed]) and few.report
    assert data("data.max_tiles=17").num_tiles == 17 and data("data.max_tiles=100").num_tiles == 90
    assert data("data.max_tiles=17", "data.slide_fraction=0.5", f"train.seed={seed}").num_tiles == 17
    none = next(seed for seed in range(99) if not any(is_used(name, 0.1, seed) for name in slides))
    with pytest.raises(ValueError, match=r"data.slide_fraction"):
        data("data.slide_fraction=0.1", f"train.seed={none}")


def test_memory_of_batches_counts_every_one_in_flight(shards: Path) -> None:
    # Eight samples of 2 x 56 and 2 x 28 px; 60 x 40 batches are prepared and one is in use.
    gib = (60 * 40 + 1) * 8 * 3 * (2 * 56**2 + 2 * 28**2) / 2**30
    text = described(shards, "train.num_workers=60", "train.prefetch_factor=40")
    assert f"and {gib:.3g} GiB of batches on each process" in text
    assert "90 tiles, 0.711 passes, 8 lanes over 12 row groups of up to 8 rows" in text


def test_oversized_row_groups_come_with_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "set", [100, 100], 100)
    assert "repack" not in described(folder)
    monkeypatch.setattr("dinov2.data.parquet.source.OVERSIZED", 1000)
    assert f"python -m dinov2.data.repack {folder} {folder}-repacked" in described(folder)


def test_too_little_shared_memory_is_said(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "/dev/shm has" in described(shards, "train.num_workers=2")
    assert "/dev/shm" not in described(shards, "train.num_workers=0")


def test_a_commit_is_kept_only_for_an_unchanged_dataset(caplog: pytest.LogCaptureFixture) -> None:
    commit = "0123456789" * 4
    before = load_config(None, ["data.path=org/name"])
    saved = {
        "config": json.loads(json.dumps(dataclasses.asdict(before))),
        "places": [f"hf://datasets/org/name@{commit}"],
    }
    caplog.clear()
    assert stream._commits(before, saved) == [commit]
    assert not caplog.messages  # nothing is said anew of keys without effect
    assert stream._commits(before, None) == [""]
    for changed in ("data.path=data/copy", "data.revision=v2"):
        now = load_config(None, ["data.path=org/name", changed])
        assert stream._commits(now, saved) == [""]
    saved["places"] = ["/data/name@home"]
    assert stream._commits(before, saved) == [""]


def test_the_hub_without_a_token_is_read_with_half_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    hub = ("hf://datasets/org/name@main",)
    assert stream._is_anonymous(hub)
    assert not stream._is_anonymous(("s3://bucket/tiles",))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert not stream._is_anonymous(hub)


TOY = f"{__name__}:Toy"


class ToySource:
    """Noise of six slides, ten tiles each; what a new kind of data has to be."""

    is_remote = False

    def __init__(self, slides: list[str], side: int) -> None:
        self.names = slides
        self.group_rows = np.full(len(slides), 10)
        self.group_bytes = self.group_rows * 10_000
        self.num_rows, self.fingerprint = 10 * len(slides), f"toy-{len(slides)}-{side}"
        self._side = side

    def read(self, group: int, rows: Sequence[int]) -> list[tuple[str, bytes]]:
        return [(self.names[group], self._encoded(100 * group + row)) for row in rows]

    def _encoded(self, number: int) -> bytes:
        noise = np.random.default_rng(number).integers(0, 256, (self._side, self._side, 3), np.uint8)
        return cv2.imencode(".png", noise)[1].tobytes()

    def decode(self, sample: EncodedSample) -> np.ndarray:
        return decode_image(sample.data)

    def describe(self, group: int, row: int | None = None) -> str:
        return f"tile {row} of slide '{self.names[group]}'"

    def slides(self, group: int) -> list[str]:
        return [self.names[group]] * 10


class Toy:
    accepts = "a file of the words 'toy tiles'"

    @dataclass(frozen=True)
    class Options:
        side: int = key(64, "of a tile", least=8, most=512)

    def recognises(self, path: str) -> bool:
        return Path(path).is_file() and Path(path).read_bytes()[:9] == b"toy tiles"

    def open(self, request: SourceRequest) -> ToySource:
        return ToySource([f"TCGA-AA-000{n}-01.svs" for n in range(6)], request.options.side)


class Endless(Toy):
    def open(self, request: SourceRequest) -> ToySource:
        source = super().open(request)
        source.is_endless = True
        return source


class Asking(Toy):
    def open(self, request: SourceRequest) -> ToySource:
        source = super().open(request)
        return ToySource([name for name in source.names if request.keep(name)], 64)


@pytest.fixture
def locations(tmp_path: Path) -> dict[str, str]:
    """A path of each sort, by name."""
    write_tissue_shards(tmp_path / "shards")
    (tmp_path / "slides/sub").mkdir(parents=True)
    (tmp_path / "slides/sub/A.SVS").write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.docx").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "scans").mkdir()
    for name, width in {"wide.bmp": 5000, "tile.bmp": 64}.items():
        cv2.imwrite(str(tmp_path / "scans" / name), np.zeros((8, width, 3), np.uint8))
    texts = {"list4.txt": "# made by\n/a b/s.svs 0 128 1\n", "list6.txt": "s.svs 0 128 1 0.5 0.5\n",
             "slides.txt": "/a b/s.svs\n", "slides.csv": "site, slide\nx,a.svs\n", "odd.csv": "a,b\n1,2\n",
             "images.txt": "a b.png\n", "notes.txt": "nothing of the kind\n", "toy": "toy tiles"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {path.name: str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("path", "kind"),
    [("{shards}", "parquet"), ("file://{shards}", "parquet"), ("{shards}/*.parquet", "parquet"),
     ("{shards}/shard-00000.parquet", "parquet"), ("org/name", "parquet"), ("org/name@v1", "parquet"),
     ("hf://datasets/org/name/train", "parquet"), ("s3://bucket/tiles", "parquet"), ("{slides}", "slides"),
     ("{list4.txt}", "sample_list"), ("{list6.txt}", "sample_list"), ("{slides.txt}", "slides"),
     ("{slides.csv}", "slides"), ("{images.txt}", "slides"), ("{scans}/wide.bmp", "slides"),
     ("{scans}/tile.bmp", "images"), ("{scans}", "images"),
     ("{slides}/sub/A.SVS", "slides"), ("https://host/a.btf", "slides"), ("https://host/a%20b.svs", "slides")],
)  # fmt: skip
def test_kinds_are_recognised(locations: dict[str, str], path: str, kind: str) -> None:
    for name, location in locations.items():
        path = path.replace(f"{{{name}}}", location)
    assert recognise(path) == kind


@pytest.mark.parametrize(
    ("name", "words"),
    [("other", "a folder that holds notes.docx"), ("empty", "is empty"), ("odd.csv", "a file that begins with b'a,b"),
     ("notes.txt", "a file that begins with b'nothing of the kind"), ("toy", "b'toy tiles'")],
)  # fmt: skip
def test_what_is_of_no_kind_is_named_with_the_kinds_there_are(locations: dict[str, str], name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"parquet: .*; sample_list: .*; slides: ") as caught:
        recognise(locations[name])
    assert words in str(caught.value) and locations[name] in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"There is no data at '/nowhere/at/all'"):
        recognise("/nowhere/at/all")


def test_a_new_kind_feeds_a_run_that_goes_on_where_it_stopped(locations: dict[str, str], tmp_path: Path) -> None:
    options = [*TINY, f"data.path={locations['toy']}", f"data.kind={TOY}", f"data.options={{{TOY!r}: {{side: 70}}}}",
               "data.validation_fraction=0.3"]  # fmt: skip
    for name, stops in {"whole": [2], "parts": [1, 2]}.items():
        for stop in stops:
            assert main(["--output-dir", str(tmp_path / name), *options, f"optim.early_stop={stop}"]) == 0
    losses = [[record["total_loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_kinds_mix_and_all_leave_out_what_is_excluded(locations: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "excluded.txt").write_text("TCGA-AA-0003\nslide_1\nnobody\n")
    mixture = [{"path": locations["shards"], "weight": 3}, {"path": locations["toy"], "kind": TOY},
               {"path": locations["toy"], "kind": f"{__name__}:Asking"}]  # fmt: skip
    data = open_data(load_config(None, [f"data.datasets={json.dumps(mixture)}",
                                        f"data.exclusion_file={tmp_path / 'excluded.txt'}"]))  # fmt: skip
    assert [source.num_rows for source in data.sources] == [60, 50, 50]
    assert data.source.num_rows == 160
    slides = {name for group in range(len(data.source.group_rows)) for name in data.source.slides(group)}
    assert not {"TCGA-AA-0003-01.svs", "slide_1"} & slides
    report = "\n".join(data.report)
    assert "training on 5 of 6 slides; 1 excluded, 0 kept for validation" in report
    assert "1 of 3 names to exclude match no slide: nobody" in report
    groups = data.order(seed=0, lanes=16, block_rows=4).locate(np.arange(1600)).group
    assert set(groups) == set(np.flatnonzero(data.source.group_rows))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_to_look_at_is_of_the_data(locations: dict[str, str], mixed: bool) -> None:
    entries = [{"path": locations["shards"]}, {"path": locations["toy"], "kind": TOY}][: 1 + mixed]
    config = load_config(None, [*TINY, f"data.datasets={json.dumps(entries)}"])
    data = open_data(config)
    tiles, batch = stream.augmented_batch(config, data)
    stored = {
        data.source.decode(EncodedSample(0, group, row, slide, encoded)).tobytes()
        for group, rows in enumerate(data.source.group_rows.tolist())
        for row, (slide, encoded) in enumerate(data.source.read(group, range(rows)))
    }
    assert len({tile.tobytes() for tile in tiles} & stored) == len(tiles) == 4
    assert batch["global_crops"].shape == (8, 3, 56, 56) and batch["local_crops"].shape == (8, 3, 28, 28)
    assert batch["masks"].any()


def test_what_has_no_end_stands_alone(locations: dict[str, str]) -> None:
    endless = {"path": locations["toy"], "kind": f"{__name__}:Endless"}
    config = load_config(None, [f"data.datasets={json.dumps([endless, {'path': locations['shards']}])}"])
    with pytest.raises(ValueError, match=r"drawn without end, with others; .* data.max_tiles"):
        open_data(config)
    alone = [f"data.path={endless['path']}", f"data.kind={endless['kind']}"]
    with pytest.raises(ValueError, match=r"drawn without end, so that data.exclusion_file"):
        open_data(load_config(None, [*alone, "data.validation_fraction=0.5"]))
    assert stream.order_parameters(config, None, open_data(load_config(None, alone)))["lanes"] == 1


def with_columns(shards: Path, folder: Path, **columns: list) -> Path:
    """A copy of shards with further columns, whose values are dealt out in turn."""
    folder.mkdir()
    for shard in sorted(shards.glob("*.parquet")):
        table = pq.read_table(shard)
        for name, values in columns.items():
            table = table.append_column(name, pa.array([values[row % len(values)] for row in range(len(table))]))
        pq.write_table(table.replace_schema_metadata(pq.read_schema(shard).metadata), folder / shard.name)
    return folder


def test_sites_are_left_out_of_what_is_trained_on(shards: Path, tmp_path: Path) -> None:
    folder = with_columns(shards, tmp_path / "sites", site=["rome", "oslo", None])
    expected = sum(
        site != "oslo" for shard in folder.glob("*.parquet") for site in pq.read_table(shard)["site"].to_pylist()
    )
    data = open_data(load_config(None, [f"data.path={folder}", "data.excluded_sites=[oslo,bonn]"]))
    assert data.source.num_rows == expected
    assert any("bonn" in line and "oslo" not in line for line in data.report)
    mixture = json.dumps([{"path": str(folder)}, {"path": str(shards)}])
    data = open_data(load_config(None, [f"data.datasets={mixture}", "data.excluded_sites=[oslo]"]))
    assert [source.num_rows for source in data.sources] == [expected, 90]
    with pytest.raises(ValueError, match=r"oslo.*site"):
        open_data(load_config(None, [f"data.path={shards}", "data.excluded_sites=[oslo]"]))


def test_patients_of_a_column_are_kept_for_validation_whole(shards: Path, tmp_path: Path) -> None:
    folder = with_columns(shards, tmp_path / "patients", patient=[f"p{number}" for number in range(7)])
    data = open_data(load_config(None, [f"data.path={folder}", "data.validation_fraction=0.5"]))
    names = [f"p{number}" for number in range(7)]
    held = {name for name in names if int(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), 16) < 2**63}
    rows = [name for shard in folder.glob("*.parquet") for name in pq.read_table(shard)["patient"].to_pylist()]
    assert 0 < len(held) < 7
    assert data.held_out[0].num_rows == sum(name in held for name in rows)
    assert data.source.num_rows == sum(name not in held for name in rows)


@pytest.mark.parametrize(
    ("good", "bad", "verdict"),
    [
        (8, 0, "fine"),
        (40, 1, "warned"),  # training replaces it
        (40, 2, "refused"),
        (0, 1, "refused"),
        (0, 300, "refused"),
    ],
)
def test_rows_are_decoded_before_a_run_is_approved(tmp_path: Path, good: int, bad: int, verdict: str) -> None:
    rows = [encode(tile(number), "png") for number in range(good)] + [b"GIF89a"] * bad
    write_published(tmp_path / "set/a.parquet", rows)
    config = load_config(None, [*TINY, f"data.path={tmp_path / 'set'}"])
    first_bad = f"row {good % 4} of row group {good // 4} of shard '{tmp_path}/set/a.parquet'"
    if verdict == "refused":
        with pytest.raises(ValueError, match=re.escape(first_bad)):
            stream.check_rows(config, open_data(config))
    else:
        lines = stream.check_rows(config, open_data(config))
        assert len(lines) == (verdict == "warned")
        assert all(first_bad in line for line in lines)


def test_each_dataset_of_a_mixture_is_decoded(tmp_path: Path) -> None:
    write_dataset(tmp_path / "good", [9, 0, 4])
    write_published(tmp_path / "bad/a.parquet", [b"GIF89a"] * 3)
    mixture = f"data.datasets=[{{path: {tmp_path}/good, weight: 1000}}, {{path: {tmp_path}/bad}}]"
    config = load_config(None, [*TINY, mixture])
    with pytest.raises(ValueError, match="3 of 3 rows"):
        stream.check_rows(config, open_data(config))
