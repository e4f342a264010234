"""Drawn tiles are pure functions of the seed, evenly spread over the positions that qualify, and cut as stored."""

import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import chisquare

from dinov2.data.augment.collate import Sample
from dinov2.data.online.positions import Geometry, Positions
from dinov2.data.online.prepare import TileOptions, load_plan, mpps_of
from dinov2.data.online.random import OnlineOrder, OnlineTileSource, take_fraction
from dinov2.data.slides.find import SlideRow, find_slides
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.resolution import MppTable
from dinov2.data.slides.tissue import TissueMask
from dinov2.data.source import DecodeError, EncodedSample
from dinov2.data.stream.loader import TrainLoader
from tests.helpers.slides import damage_tile

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
MPPS = mpps_of((40, 20, 10, 5))
SMALL = TileOptions(MPPS, (1.0, 1.0, 1.0, 1.0), tile_size=96)  # the demo's slides are small
MakeSource = Callable[..., OnlineTileSource]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tissue")


@pytest.fixture
def make(demo_slides: tuple[Path, Path], cache: Path) -> MakeSource:
    """A source of the demo's slides, unless others are given."""

    def make(rows: list[SlideRow] | None = None, **options) -> OnlineTileSource:
        rows = rows or [SlideRow(str(path)) for path in demo_slides]
        return OnlineTileSource(rows, cache, **{"options": SMALL, "seed": 11, **options})

    return make


def pixels(source: OnlineTileSource, group: int, rows: list[int]) -> list[np.ndarray]:
    stored = source.read(group, rows)
    return [source.decode(EncodedSample(0, group, row, *item)) for row, item in zip(rows, stored, strict=True)]


def mean_of(image: np.ndarray, _: int) -> float:
    return float(image.mean())


def collate(samples: list[Sample]) -> dict:
    return {"patches": [(s.index, s.crops, s.slide) for s in samples], "damage": [s.fault for s in samples]}


def run(source: OnlineTileSource, world: int, workers: int, start: int = 0, steps: int = 3) -> list[tuple]:
    tiles: list[tuple] = []
    for rank in range(world):
        loader = TrainLoader(
            source, mean_of, collate, global_batch=48, rank=rank, world_size=world, start_sample=start,
            order=source.order(seed=11, lanes=48, block_rows=64), num_workers=workers,
        )  # fmt: skip
        batches = iter(loader)
        tiles += [tile for batch in islice(batches, steps) for tile in batch["patches"]]
        batches.close()
    return sorted(tiles)


# --- where tiles may lie ---


def count_by_hand(cells: np.ndarray, cell_px: float, geometry: Geometry, least: float) -> set[tuple[int, int]]:
    n = max(1, round(geometry.side * geometry.downsample / cell_px))

    def nearest(position: int, blocks: int) -> int:
        return min(int(np.floor(position * geometry.downsample / cell_px + 0.5)), blocks - 1)

    found = set()
    for row in range(geometry.height - geometry.side + 1):
        for column in range(geometry.width - geometry.side + 1):
            top, left = nearest(row, len(cells) - n + 1), nearest(column, cells.shape[1] - n + 1)
            if cells[top : top + n, left : left + n].mean() >= least - 1e-12:
                found.add((column, row))
    return found


@pytest.mark.parametrize(
    ("downsample", "side", "cell_px", "least"),
    [
        (1.0, 40, 8.0, 0.4),
        (4.0, 9, 8.003, 0.5),
        (2.0005, 16, 32.01, 0.4),
        (1.0, 5, 32.0, 1.0),
        (3.0, 30, 8.0, 0.0),
    ],
)
def test_every_position_that_qualifies_is_drawn_by_one_number(
    downsample: float, side: int, cell_px: float, least: float
) -> None:
    rng = np.random.default_rng(3)
    width, height = 61, 83
    shape = [int(np.ceil(length * downsample / cell_px)) for length in (height, width)]
    cells = cv2.blur((rng.random(shape) < 0.5).astype(np.float32), (3, 3)) > 0.5
    mask = TissueMask(np.packbits(cells, axis=1), shape[1], cell_px)
    geometry = Geometry(0, width, height, downsample, side, 0.5)
    counted = Positions.count(mask, geometry, least)
    positions = [counted.position(mask, number) for number in range(len(counted))]
    assert len(set(positions)) == len(positions)
    assert set(positions) == count_by_hand(cells, cell_px, geometry, least) and positions


def test_slides_smaller_than_a_tile_have_no_positions() -> None:
    mask = TissueMask(np.full((3, 1), 255, np.uint8), 4, 32.0)
    assert len(Positions.count(mask, Geometry(0, 100, 90, 1.0, 91, 0.5), 0.4)) == 0
    assert len(Positions.count(mask, Geometry(0, 100, 90, 1.0, 90, 0.5), 0.4)) == 11


def test_slides_resolutions_and_positions_are_drawn_as_weighted(
    make: MakeSource, demo_slides: tuple[Path, Path]
) -> None:
    """The seed is fixed, so the tests pass or fail for good; a right draw fails them with probability 0.001 each."""
    rows = [SlideRow(str(path), weight) for path, weight in zip(demo_slides, (1.0, 3.0), strict=True)]
    weights = (1.0, 2.0, 4.0, 1.0)
    source = make(rows, options=TileOptions(MPPS, weights, tile_size=96))
    tiles = [source.draw(number) for number in range(4000)]
    by_path = {slide.path: number for number, slide in enumerate(source.slide_list)}
    drawn = Counter(tile.slide for tile in tiles)
    order = [by_path[str(path)] for path in demo_slides]
    assert chisquare([drawn[number] for number in order], [1000, 3000]).pvalue > 0.001
    for number, slide in enumerate(source.slide_list):
        own = [tile for tile in tiles if tile.slide == number]
        counts = Counter(slide.geometries[tile.geometry].mpp for tile in own)
        assert all(slide.counts)  # each slide can give all four
        assert chisquare([counts[mpp] for mpp in MPPS], np.array(weights) / 8 * len(own)).pvalue > 0.001


def test_positions_are_drawn_evenly(make: MakeSource, train_slide: Path) -> None:
    """Numbers map one to one to positions (see above), so evenly spread numbers are what is left to show."""
    source = make([SlideRow(str(train_slide))], options=TileOptions((0.5,), (1.0,), tile_size=96))
    plan = load_plan(source.slide_list[0], SMALL.min_foreground)
    (positions,) = plan.positions
    numbers = range(0, len(positions), 37)
    expected = count_bins([positions.position(plan.mask, number) for number in numbers])
    drawn = [source.draw(number)[2:] for number in range(4000)]
    kept = expected / expected.sum() * 4000 > 5
    expected = expected[kept] / expected[kept].sum() * count_bins(drawn)[kept].sum()
    assert kept.sum() > 20 and chisquare(count_bins(drawn)[kept], expected).pvalue > 0.001
    assert len(set(drawn)) > 3900


def count_bins(positions: list[tuple[int, int]]) -> np.ndarray:
    columns, rows = np.array(positions).T
    return np.histogram2d(columns, rows, bins=8, range=((0, 1152), (0, 888)))[0]


def test_only_resolutions_that_a_slide_can_give_are_drawn(make: MakeSource) -> None:
    source = make(options=TileOptions((0.1, 0.25, 8.0), (5.0, 1.0, 5.0), tile_size=96))
    assert {g.mpp for slide in source.slide_list for g in slide.geometries} == {0.25, 8.0}
    drawn = {source.slide_list[p.slide].geometries[p.geometry].mpp for p in map(source.draw, range(200))}
    assert drawn == {0.25}  # at 8 um/px a tile is larger than the slide


# --- what comes out ---


def test_tiles_show_the_tissue_that_was_asked_for(make: MakeSource) -> None:
    source = make()
    for number, image in enumerate(pixels(source, 0, list(range(64)))):
        tile = source.draw(number)
        slide = source.slide_list[tile.slide]
        g, plan = slide.geometries[tile.geometry], load_plan(slide, SMALL.min_foreground)
        scale = g.downsample / plan.mask.cell_px
        n = max(1, round(g.side * scale))
        top, left = (int(np.floor(position * scale + 0.5)) for position in (tile.row, tile.column))
        block = plan.mask.cells()[top : top + n, left : left + n]
        assert block.mean() >= 0.4
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        # Edges are off by half a cell at most, and a foreground cell may be tissue by half only.
        assert np.all((hsv >= (90, 8, 103)) & (hsv <= (180, 255, 255)), axis=-1).mean() > 0.15


def test_tiles_are_the_pixels_of_the_level(
    make: MakeSource, train_slide: Path, stored_levels: list[np.ndarray]
) -> None:
    source = make([SlideRow(str(train_slide))])
    for number, image in enumerate(pixels(source, 0, list(range(64)))):
        _, which, column, row = source.draw(number)
        g = source.slide_list[0].geometries[which]
        stored = stored_levels[g.level][row : row + g.side, column : column + g.side]
        assert (g.level, g.side) == {0.25: (0, 96), 0.5: (1, 96), 1.0: (2, 96), 2.0: (2, 192)}[g.mpp]
        if g.mpp == 2.0:  # the mean of 2 x 2 px
            stored = np.rint(stored.reshape(96, 2, 96, 2, 3).mean((1, 3)) + 1e-6)
            np.testing.assert_allclose(image, stored, atol=1)
        else:
            np.testing.assert_array_equal(image, stored)


@pytest.mark.data
def test_real_slides_give_the_readers_tiles(
    make: MakeSource, jpeg_slide: Path, jpeg2000_slide: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{jpeg_slide}\n{jpeg2000_slide}\n")
    rows = find_slides(listed, mpp_table=MppTable({"tcga-cr-7395-01a-01-ts1": 0.25}, {})).slides
    source = make(rows, options=TileOptions(MPPS, (1.0,) * 4))
    given = {Path(slide.path): {g.mpp for g in slide.geometries} for slide in source.slide_list}
    assert given == {jpeg_slide: {0.5, 1.0, 2.0}, jpeg2000_slide: {0.25, 0.5, 1.0, 2.0}}
    table = {row.path: row.mpp for row in rows}
    readers = [SlideReader(slide.path, mpp=table[slide.path]) for slide in source.slide_list]
    for number, image in enumerate(pixels(source, 0, list(range(24)))):
        slide, which, column, row = source.draw(number)
        g, reader = source.slide_list[slide].geometries[which], readers[slide]
        x, y = reader.origin(g.level, column, row)
        np.testing.assert_array_equal(image, reader.read_tile(x, y, 224, g.mpp))


def test_slides_for_openslide_are_cut_by_the_worker(
    make: MakeSource, train_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_tiles = make([SlideRow(str(train_slide))])
    expected = pixels(by_tiles, 0, [0, 1, 2])
    from dinov2.data.online import prepare as online_slides

    def unsupported(path: str) -> None:
        raise online_slides.UnsupportedTiles(path, "of another kind")

    monkeypatch.setattr(online_slides, "index_slide", unsupported)
    source = OnlineTileSource([SlideRow(str(train_slide))], tmp_path, options=SMALL, seed=11)
    assert source.slide_list[0].blocks is None and all(len(data) < 64 for _, data in source.read(0, range(3)))
    for image, same in zip(pixels(source, 0, [0, 1, 2]), expected, strict=True):
        np.testing.assert_array_equal(image, same)


# --- order, purity, caps ---


def test_endless_order_is_its_own_inverse() -> None:
    order = OnlineOrder(5, groups=3)
    positions = order.locate(np.arange(1000))
    for epoch, group in set(zip(positions.epoch.tolist(), positions.group.tolist(), strict=True)):
        indices, rows = order.members(epoch, group, 0)
        found = order.locate(indices)
        assert set(found.epoch) == {epoch} and set(found.group) == {group} and not found.chunk.any()
        np.testing.assert_array_equal(found.row, rows)
    np.testing.assert_array_equal(positions.group * 64 + positions.row + 192 * positions.epoch, np.arange(1000))


def test_a_tile_depends_on_seed_and_number_only(make: MakeSource) -> None:
    source = make()
    whole = source.read(2, range(64))
    assert [source.read(2, [row])[0] for row in (63, 0, 17)] == [whole[63], whole[0], whole[17]]
    assert pickle.loads(pickle.dumps(source)).read(2, range(64)) == whole and len(pickle.dumps(source)) < 20_000
    assert [name for name, _ in whole] == source.slides(2)
    other = make(seed=12)
    assert other.read(2, range(64)) != whole and other.fingerprint != source.fingerprint
    assert make().fingerprint == source.fingerprint


@pytest.mark.parametrize("max_tiles", [0, 100])
def test_ranks_workers_and_resumption_do_not_change_the_tiles(make: MakeSource, max_tiles: int) -> None:
    source = make(max_tiles=max_tiles)
    alone = run(source, 1, 0)
    assert [index for index, _, _ in alone] == list(range(144)) and len({mean for _, mean, _ in alone}) >= 95
    assert run(source, 2, 1) == alone
    assert run(source, 1, 0, start=48, steps=2) == alone[48:]


def test_capped_tiles_are_the_first_of_the_endless_and_come_once_per_epoch(make: MakeSource) -> None:
    endless, hundred, thousand = (make(max_tiles=cap) for cap in (0, 100, 1000))
    assert hundred.group_rows.tolist() == [64, 36] and thousand.num_rows == 1000
    assert hundred.read(1, [5]) == thousand.read(1, [5]) == endless.read(1, [5])
    positions = hundred.order(seed=3, lanes=8, block_rows=64).locate(np.arange(200))
    numbers = positions.group * 64 + positions.row
    assert sorted(numbers[:100]) == sorted(numbers[100:]) == list(range(100))
    assert len({thousand.draw(number) for number in range(1000)}) == 1000
    assert len({endless.fingerprint, hundred.fingerprint, thousand.fingerprint}) == 3


def test_memory_is_estimated_from_above(make: MakeSource) -> None:
    source = make()
    for group in range(5):
        assert sum(len(data) for _, data in source.read(group, range(64))) <= source.group_bytes[group]


# --- what goes wrong ---


def test_corrupt_tile_is_replaced_and_named(make: MakeSource, train_slide: Path, tmp_path: Path) -> None:
    corrupt = damage_tile(train_slide, tmp_path / "garbage.svs", 9 * 3 + 4, empty=False)
    source = make([SlideRow(str(corrupt))])
    loader = TrainLoader(
        source, mean_of, collate, global_batch=64, rank=0, world_size=1, start_sample=0,
        order=source.order(11, 64, 64), num_workers=0, max_corrupt_fraction=1.0,
    )  # fmt: skip
    batches = iter(loader)
    damages = [text for batch in islice(batches, 3) for text in batch["damage"] if text]
    batches.close()
    assert damages and all("garbage.svs" in text and "level 0, tile row 3, tile column 4" in text for text in damages)
    assert all(f"tile {int(text.split()[1].rstrip(','))}, slide" in text and "0.25 um/px" in text for text in damages)


def test_missing_tile_is_an_error(make: MakeSource, train_slide: Path, tmp_path: Path) -> None:
    hole = damage_tile(train_slide, tmp_path / "hole.svs", 9 * 3 + 4, empty=True)
    source = make([SlideRow(str(hole))], options=TileOptions((0.25,), (1.0,), tile_size=96))
    failed = 0
    for row, item in enumerate(source.read(0, range(64)) + source.read(1, range(64))):
        try:
            source.decode(EncodedSample(0, row // 64, row % 64, *item))
        except DecodeError as error:
            failed += "the tile is missing from the file" in str(error)
    assert failed > 0


def test_unreadable_slides_are_left_out_up_to_a_fraction(
    make: MakeSource, train_slide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(train_slide.read_bytes()[:20_000])
    rows = [SlideRow(str(train_slide)), SlideRow(str(broken))]
    with pytest.raises(ValueError, match=r"1 of 2 slides cannot be read, where 5.0% may be left out; .*broken.svs'"):
        make(rows)
    monkeypatch.setattr("dinov2.data.online.random._MAX_UNREADABLE", 0.5)
    source = make(rows)
    assert [Path(slide.path).name for slide in source.dropped] == ["broken.svs"]
    assert "broken.svs' is left out" in caplog.text
    assert source.fingerprint != make(rows[:1]).fingerprint
    with pytest.raises(ValueError, match=r"None of 1 slides gives tiles: 1 because at 0\.25 um/px it is coarser"):
        make(rows[:1], options=TileOptions((0.1,), (1.0,)))


# --- which slides ---


def test_fractions_of_slides_are_nested_and_do_not_depend_on_the_folder() -> None:
    rows = [SlideRow(f"/a/{i}.svs") for i in range(200)]
    one, ten, half = (take_fraction(rows, fraction, 7) for fraction in (0.001, 0.1, 0.5))
    assert (len(one), len(ten), len(half)) == (1, 20, 100)
    assert set(one) < set(ten) < set(half) and take_fraction(rows, 1.0, 7) == rows
    moved = take_fraction([SlideRow(f"/b/c/{i}.svs") for i in range(200)], 0.1, 7)
    assert [Path(row.path).name for row in moved] == [Path(row.path).name for row in ten]
    assert take_fraction(rows, 0.1, 8) != ten


def test_the_order_of_the_slides_does_not_matter(make: MakeSource, demo_slides: tuple[Path, Path]) -> None:
    one, two = (make([SlideRow(str(path)) for path in order]) for order in (demo_slides, demo_slides[::-1]))
    assert one.fingerprint == two.fingerprint and one.read(0, range(64)) == two.read(0, range(64))


# --- slides on a server ---


class RangeHandler(SimpleHTTPRequestHandler):
    """Plain files, in ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = 0, len(content) - 1
        if wanted := self.headers.get("Range"):
            start, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])


@pytest.fixture
def web(demo_slides: tuple[Path, Path]) -> Iterator[str]:
    handler = partial(RangeHandler, directory=str(demo_slides[0].parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_slides_on_a_server_give_the_same_tiles(make: MakeSource, web: str, demo_slides: tuple[Path, Path]) -> None:
    local, remote = make(), make([SlideRow(f"{web}/{path.name}") for path in demo_slides])
    assert remote.is_remote and not local.is_remote
    assert [data for _, data in remote.read(0, range(64))] == [
        data for _, data in make(sorted_like(remote, demo_slides)).read(0, range(64))
    ]
    assert run(remote, 1, 0, steps=1)[0][2].startswith(web)


def sorted_like(remote: OnlineTileSource, slides: tuple[Path, Path]) -> list[SlideRow]:
    by_name = {path.name: str(path) for path in slides}
    return [SlideRow(by_name[Path(slide.path).name]) for slide in remote.slide_list]
