"""Cost of slides: tiles, sample lists and Parquet shards, against OpenSlide as the published scripts use it.

    python benchmarks/bench_slides.py [--seconds 3] [--output results.json] [--tiny] [SLIDE ...]

Beside the slides given it makes a large one, 65536 x 49152 px of JPEG tiles, with the demo's tissue repeated
on 28 % of it. Times are CPU time of one thread; rates are per second of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import cpu_ms, describe_machine
from dinov2.data.prepare.draw import Sampling, SlideJob, draw_from_slide
from dinov2.data.slides.blocks import Region, assemble, ranges
from dinov2.data.slides.ranges import SlideBytes
from dinov2.data.slides.reader import SlideReader
from dinov2.data.slides.tiff import index_slide
from dinov2.data.slides.tissue import TissueRule
from prepatching_scripts.build_parquet_sample_dataset import main as build
from prepatching_scripts.make_demo_slide import render_haematoxylin_eosin

TILE, BLOCK = 224, 256
LARGE = (65536, 49152)
RADIUS = 0.3  # of the tissue, in sides of the slide: 28 % of its area
READS = 64  # random tiles per measured call


def write_large_slide(path: Path, width: int, height: int) -> Path:
    """Write an Aperio-style pyramid, levels 1, 4 and 16: repeated tissue tiles amid glass."""
    from skimage.data import immunohistochemistry
    from tifffile import TiffWriter

    tissue = render_haematoxylin_eosin(immunohistochemistry())[: 2 * BLOCK, : 2 * BLOCK]
    corners = itertools.product(range(0, 2 * BLOCK, BLOCK), repeat=2)
    turned = [np.rot90(tissue[y : y + BLOCK, x : x + BLOCK], turn) for y, x in corners for turn in range(4)]
    tiles = []
    for tile in [*turned, np.full_like(turned[0], 245)]:
        buffer = io.BytesIO()
        Image.fromarray(tile).save(buffer, "jpeg", quality=70, subsampling="4:2:0")
        tiles.append(buffer.getvalue())
    rng = np.random.default_rng(0)

    def encoded(columns: int, rows: int) -> Iterator[bytes]:
        for row, column in itertools.product(range(rows), range(columns)):
            from_centre = np.hypot((row + 0.5) / rows - 0.5, (column + 0.5) / columns - 0.5)
            yield tiles[rng.integers(len(turned))] if from_centre < RADIUS else tiles[-1]

    options = {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2), "subfiletype": 0}
    options |= {"metadata": None, "software": None, "dtype": np.uint8}
    source = f"Aperio Image Library v12.0.15 \r\n{width}x{height} [0,0 {width}x{height}] ({BLOCK}x{BLOCK})"
    with TiffWriter(path, bigtiff=True) as tiff:
        for downsample in (1, 4, 16):
            w, h = width // downsample, height // downsample
            size = "" if downsample == 1 else f" -> {w}x{h}"
            tiff.write(
                encoded(-(-w // BLOCK), -(-h // BLOCK)),
                shape=(h, w, 3),
                tile=(BLOCK, BLOCK),
                description=f"{source}{size} JPEG/RGB Q=70|AppMag = 40|MPP = 0.2525",
                **options,
            )
            if downsample == 1:  # readers take the second page for the thumbnail
                tiff.write(
                    cv2.resize(tissue, (512, 384)),
                    rowsperstrip=16,
                    description=source,
                    metadata=None,
                    software=None,
                    compression="jpeg",
                    photometric="rgb",
                )
    return path


def measure_reads(path: Path, seconds: float) -> dict[str, float]:
    """Tiles of 224 px per CPU second at random positions of level 0."""
    import openslide

    reader, handle = SlideReader(path), openslide.OpenSlide(path)
    width, height = reader.level_dimensions[0]
    rng = np.random.default_rng(0)
    size = (TILE, TILE)

    def open_per_read(x: int, y: int) -> object:
        with openslide.OpenSlide(path) as slide:
            return slide.read_region((x, y), 0, size).convert("RGB")

    ways: dict[str, Callable[[int, int], object]] = {
        "openslide_open_per_read": open_per_read,
        "openslide_cached": lambda x, y: handle.read_region((x, y), 0, size).convert("RGB"),
        "ours": lambda x, y: reader.read_region(0, x, y, *size),
    }

    def rate(way: Callable[[int, int], object]) -> float:
        def reads() -> None:
            xs, ys = rng.integers(0, width - TILE, READS), rng.integers(0, height - TILE, READS)
            for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
                way(x, y)

        return 1000 * READS / cpu_ms(reads, seconds)

    return {name: rate(way) for name, way in ways.items()}


def measure_list(path: Path, lines: int, seconds: float) -> dict[str, float]:
    """Verified lines of a sample list per CPU second, level by level, as many on each."""
    rule = TissueRule()
    sampling = Sampling(rule, seed=0, levels=None, per_target=lines, per_slide=None, tile_size=TILE)
    levels = len(SlideReader(path).level_dimensions)

    def ours() -> None:
        draw_from_slide(SlideJob(str(path), path.name, sampling))

    def published() -> None:
        for level in range(levels):
            _published_pass(path, level, lines, rule)

    count = len(draw_from_slide(SlideJob(str(path), path.name, sampling)).rows)
    return {
        "published": 1000 * lines * levels / cpu_ms(published, seconds),
        "ours": 1000 * count / cpu_ms(ours, seconds),
    }


def _published_pass(path: Path, level: int, lines: int, rule: TissueRule) -> None:
    """What the published script does for a slide and level: open, draw anywhere, read and judge until it has enough."""
    import openslide

    rng, found = np.random.default_rng(0), 0
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        for _ in range(1000 * lines):
            corner = int(rng.integers(0, width - TILE)), int(rng.integers(0, height - TILE))
            image = np.array(slide.read_region(corner, level, (TILE, TILE)).convert("RGB"))
            found += rule.accepts(image)
            if found == lines:
                return


def measure_pack(path: Path, folder: Path, rows: int, seconds: float) -> dict[str, float]:
    """Rows per CPU second from a sample list of level 0 to a Parquet shard of JPEG tiles."""
    sampling = Sampling(TissueRule(), seed=0, levels=(0,), per_target=rows, per_slide=None, tile_size=TILE)
    corners = draw_from_slide(SlideJob(str(path), path.name, sampling)).rows[:, :2].tolist()
    listed, builds = folder / "list.txt", itertools.count()
    listed.write_text("".join(f"{path} {x} {y} 0\n" for x, y in corners))

    def ours() -> None:
        arguments = ["--output", str(folder / f"ours{next(builds)}"), "--encoding", "jpeg", "--workers", "1"]
        if build([str(listed), *arguments]) != 0:
            raise RuntimeError("the builder failed")

    return {
        "published": 1000 * len(corners) / cpu_ms(lambda: _published_pack(path, folder, corners), seconds),
        "ours": 1000 * len(corners) / cpu_ms(ours, seconds),
    }


def _published_pack(path: Path, folder: Path, corners: list[list[int]]) -> None:
    """What the published script does: open the slide for every tile, encode with Pillow, write one row group."""
    import openslide

    images = []
    for x, y in corners:
        with openslide.OpenSlide(path) as slide:
            image = slide.read_region((x, y), 0, (TILE, TILE)).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=95, optimize=True)
        images.append(buffer.getvalue())
    pq.write_table(pa.table({"image_bytes": images}), folder / "published.parquet")


def measure_remote(path: Path, seconds: float) -> float:
    """224 px tiles per second of wall time, 32 at a time, from a server 20 ms away; the server shares the cores."""
    index, rng = index_slide(str(path)), np.random.default_rng(0)
    level = index.levels[0]
    with _delaying_server(path) as url:

        def batch() -> None:
            columns = rng.integers(0, level.width - TILE, 32).tolist()
            tops = rng.integers(0, level.height - TILE, 32).tolist()
            regions = [Region(0, x, y, TILE, TILE) for x, y in zip(columns, tops, strict=True)]
            wanted = [ranges(index, region) for region in regions]
            tiles = iter(SlideBytes(url).read([extent for extents in wanted for extent in extents]))
            for region, extents in zip(regions, wanted, strict=True):
                assemble(index, region, [next(tiles) for _ in extents])

        batch()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch()
            done += 32
        return done / (time.perf_counter() - start)


@contextlib.contextmanager
def _delaying_server(path: Path) -> Iterator[str]:
    content = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(0.02)
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 512
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{path.name}"
        server.shutdown()


def table(results: dict[str, Any]) -> str:
    """Rates and ratios as Markdown."""
    lines = [
        "| slide | what | published way | OpenSlide, cached | ours | ours over published |",
        "|---|---|---|---|---|---|",
    ]
    for name, slide in results["slides"].items():
        reads, listed = slide["reads_per_s"], slide["list_lines_per_s"]
        first, cached, ours = reads["openslide_open_per_read"], reads["openslide_cached"], reads["ours"]
        lines.append(f"| {name} | 224 px tiles | {first:.0f}/s | {cached:.0f}/s | {ours:.0f}/s | {ours / first:.1f} |")
        ratio = listed["ours"] / listed["published"]
        lines.append(f"| {name} | list lines | {listed['published']:.0f}/s | | {listed['ours']:.0f}/s | {ratio:.1f} |")
        packed, ratio = (
            slide["pack_rows_per_s"],
            slide["pack_rows_per_s"]["ours"] / slide["pack_rows_per_s"]["published"],
        )
        lines.append(f"| {name} | JPEG rows | {packed['published']:.0f}/s | | {packed['ours']:.0f}/s | {ratio:.1f} |")
        lines.append(f"| {name} | tiles, 20 ms away | | | {slide['remote_patches_per_s']:.0f}/s | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path, nargs="*", help="slides to measure besides the one that is made")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small slide: shows that it runs, and no more")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    packages = (
        "openslide-python",
        "tifffile",
        "imagecodecs",
        "simplejpeg",
        "opencv-python-headless",
        "numpy",
    )
    results: dict[str, Any] = {"machine": describe_machine(packages), "slides": {}}
    with tempfile.TemporaryDirectory() as scratch:
        size = (16384, 12288) if args.tiny else LARGE
        large = write_large_slide(Path(scratch) / f"repeated-{size[0]}x{size[1]}.svs", *size)
        for slide in [large, *args.slides]:
            folder = Path(scratch) / slide.stem
            folder.mkdir()
            results["slides"][slide.name] = {
                "reads_per_s": measure_reads(slide, args.seconds),
                "list_lines_per_s": measure_list(slide, 10 if args.tiny else 150, args.seconds),
                "pack_rows_per_s": measure_pack(slide, folder, 16 if args.tiny else 256, args.seconds),
                "remote_patches_per_s": measure_remote(slide, args.seconds),
            }
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
