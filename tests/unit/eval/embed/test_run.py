"""`python -m dinov2.eval.embed` on images and rows: embeddings, their order, restarts, processes, refusals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.helpers.backbones import SMALL, randomise
from tests.helpers.checkpoints import forget
from tests.helpers.embedding import contents, embed, expected, make_teacher, refused, rows_of
from tests.helpers.shards import encode, write_groups

ROOT = Path(__file__).parents[4]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Its file and backbone."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images of two sizes in two folders and three formats, one neither square nor whole patches; by name."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    stored = {}
    for number in range(20):
        shape = [(56, 56), (84, 56)][number % 3 == 0] if number != 10 else (61, 75)
        name = f"{'ab'[number % 2]}/{number:02}.{('png', 'tif', 'bmp')[number % 3]}"
        stored[name] = rng.integers(0, 256, (*shape, 3), np.uint8)
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(stored[name]).save(root / name)
    (root / "notes.md").write_text("no image")
    return root, dict(sorted(stored.items()))


@pytest.mark.parametrize(
    "options", [(), ("--batch-size", 1, "--workers", 1), ("--batch-size", 7, "--rows-per-file", 3)]
)
def test_folder_of_images(teacher, images, tmp_path, options, capsys):
    root, stored = images
    table, embeddings = rows_of(embed(teacher, root, tmp_path / "out", "--kind", "images", *options))
    assert table["name"].to_pylist() == list(stored)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 96)
    plain = [np.asarray(Image.open(root / name).convert("RGB")) for name in stored]
    plain = [image[2:58, 2:72] if image.shape[:2] == (61, 75) else image for image in plain]
    np.testing.assert_allclose(embeddings, expected(teacher, plain), atol=1e-5)
    said = capsys.readouterr().err
    assert (
        "75 x 61 px are cut to 70 x 56" in said
        and "mean [0.7, 0.5, 0.6] of training, std [0.2, 0.25, 0.3] of training" in said
    )


def test_tokens_resize_and_colours(teacher, images, tmp_path):
    root, stored = images
    some = tmp_path / "some"
    some.mkdir()
    for name in [name for name in stored if name.endswith(".png")][:3]:
        os.link(root / name, some / Path(name).name)
    small = [np.asarray(Image.open(path)) for path in sorted(some.iterdir())]
    assert {image.shape for image in small} == {(84, 56, 3)}
    squares = [Image.fromarray(image[14:70]).resize((28, 28), Image.Resampling.BICUBIC) for image in small]
    options = ["--output-tokens", "cls_mean", "--resize", 28, "--mean", *IMAGENET[0], "--std", *IMAGENET[1]]
    _, embeddings = rows_of(embed(teacher, some, tmp_path / "out", *options))
    reference = expected(teacher, squares, *IMAGENET, with_mean=True)
    assert embeddings.shape == (3, 192)
    # Pillow and OpenCV differ by a grey level here and there.
    assert np.abs(embeddings - reference).max() < 0.1 * np.abs(reference).std()
    half = embed(teacher, some, tmp_path / "half", *options, "--dtype", "bf16")
    assert pq.read_table(half).schema.field("embedding").type == pa.list_(pa.float16(), 192)
    assert 0 < np.abs(rows_of(half)[1].astype(np.float32) - embeddings).max() < 0.1


def shard(path, numbers, group):
    """PNG tiles of 56 px with places, as our own shards have them."""
    tiles = [np.random.default_rng(number).integers(0, 256, (56, 56, 3), np.uint8) for number in numbers]
    columns = {
        "slide_path": [f"/slides/{number // 10}.svs" for number in numbers],
        "x": pa.array([100 * number for number in numbers], pa.int32()),
        "y": pa.array([7 * number for number in numbers], pa.int32()),
        "level": pa.array([1] * len(numbers), pa.int32()),
        "mpp": pa.array([0.5] * len(numbers), pa.float32()),
        "tile_size": pa.array([56] * len(numbers), pa.int32()),
        "image_bytes": [encode(tile, "png") for tile in tiles],
    }
    write_groups(path, pa.table(columns), group)
    return tiles


@pytest.mark.parametrize("rows", [4, 2048])
def test_parquet(teacher, tmp_path, rows):
    tiles = shard(tmp_path / "in/a.parquet", range(13), 5) + shard(tmp_path / "in/b/c.parquet", range(13, 20), 3)
    output = embed(teacher, tmp_path / "in", tmp_path / "out", "--rows-per-file", rows)
    assert len(list(output.glob("*.parquet"))) == -(-20 // rows)
    table, embeddings = rows_of(output)
    np.testing.assert_allclose(embeddings, expected(teacher, tiles), atol=1e-5)
    assert table["x"].to_pylist() == [100 * n for n in range(20)]
    assert table["y"].to_pylist() == [7 * n for n in range(20)]
    assert table["slide"].to_pylist() == [f"/slides/{n // 10}.svs" for n in range(20)]
    names = [f"a.parquet:{n}" for n in range(13)] + [f"b/c.parquet:{n}" for n in range(7)]
    assert table["name"].to_pylist() == names
    assert set(table["level"].to_pylist()) == {1} and set(table["mpp"].to_pylist()) == {0.5}


def test_parquet_without_places(teacher, tmp_path):
    tiles = [np.full((56, 56, 3), 40 * number, np.uint8) for number in range(5)]
    paths = [f"slide/{number}_0_1.jpg" for number in range(5)]
    stored = pa.table({"path": paths, "jpeg": [encode(tile, "png") for tile in tiles]})
    write_groups(tmp_path / "in.parquet", stored, 2)
    table, embeddings = rows_of(embed(teacher, tmp_path / "in.parquet", tmp_path / "out"))
    np.testing.assert_allclose(embeddings, expected(teacher, tiles), atol=1e-5)
    assert table["name"].to_pylist() == paths and table["x"].null_count == 5
    assert table["slide"].to_pylist() == ["slide"] * 5


def command(teacher, source, output, *options):
    """The command line of a process of its own."""
    words = [sys.executable, "-m", "dinov2.eval.embed", "--checkpoint", teacher[0], "--input", source]
    words += ["--output", output, "--device", "cpu", "--kind", "images", "--batch-size", 4, *options]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two hundred images."""
    root = tmp_path_factory.mktemp("many")
    for number in range(200):
        pixels = np.random.default_rng(number).integers(0, 256, (224, 224, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03}.png")
    return root


def test_a_killed_run_goes_on(teacher, many, tmp_path):
    options = ["--rows-per-file", 4, "--workers", 1]
    process = subprocess.Popen(command(teacher, many, tmp_path / "out", *options), cwd=ROOT)
    while len(contents(tmp_path / "out")) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.parquet")}
    assert 3 <= len(done) < 50
    (tmp_path / "out" / f".part-000049.parquet.{'0' * 32}.part").write_bytes(b"cut sh")
    again = ["--kind", "images", "--batch-size", 4, *options]
    embed(teacher, many, tmp_path / "out", *again)
    assert {path: path.stat().st_ino for path in done} == done  # not made again
    assert not list((tmp_path / "out").glob(".*.part"))
    assert contents(tmp_path / "out") == contents(embed(teacher, many, tmp_path / "whole", *again))
    names = rows_of(tmp_path / "out")[0]["name"].to_pylist()
    assert names == [f"{number:03}.png" for number in range(200)]


@pytest.mark.slow
def test_two_processes_equal_one(teacher, images, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    line = command(teacher, images[0], tmp_path / "two", "--rows-per-file", 3)
    ranks = [
        subprocess.Popen(line, cwd=ROOT, env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "Wrote 11 embeddings" in said[0]  # files 0, 2, 4, 6 of seven
    one = embed(teacher, images[0], tmp_path / "one", "--kind", "images", "--batch-size", 4, "--rows-per-file", 3)
    assert contents(tmp_path / "two") == contents(one)


def test_hdf5(teacher, images, tmp_path):
    output = embed(teacher, images[0], tmp_path / "tiles", "--format", "hdf5", "--kind", "images", "--batch-size", 7)
    with h5py.File(output / "part-000000.h5") as file:
        assert [name.decode() for name in file["name"]] == list(images[1]) and len(file["features"]) == 20


def test_other_runs_are_refused(teacher, images, tmp_path, capsys):
    root, output = images[0], tmp_path / "out"
    embed(teacher, root, output, "--kind", "images")
    before = contents(output)
    other = tmp_path / "other.pth"
    torch.save(randomise(DinoVisionTransformer(**SMALL, num_register_tokens=2)).state_dict(), other)
    other.with_suffix(".json").write_text(teacher[0].with_suffix(".json").read_text())
    forget(other)
    assert "holds a build with checkpoint_sha256" in refused((other,), capsys, root, output, "--kind", "images")
    said = refused(teacher, capsys, root, output, "--kind", "images", "--output-tokens", "cls_mean")
    assert "output_tokens 'cls', not 'cls_mean'" in said
    said = refused(teacher, capsys, root, output, "--kind", "images", "--dtype", "bf16")
    assert "dtype 'fp32', not 'bf16'" in said
    (tmp_path / "one").mkdir()
    os.link(next(iter(root.glob("a/*.png"))), tmp_path / "one" / "x.png")
    assert "with input" in refused(teacher, capsys, tmp_path / "one", output)
    assert contents(output) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "holds other files, 'mine.txt'" in refused(teacher, capsys, tmp_path / "one", tmp_path / "full")
    assert "is a file" in refused(teacher, capsys, tmp_path / "one", tmp_path / "full/mine.txt")
    assert "lies in the input" in refused(teacher, capsys, root, root / "out")


def test_corrupt_images(teacher, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    good = np.full((56, 56, 3), 90, np.uint8)
    for name in "abcd":
        Image.fromarray(good).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in/b.png").write_bytes(b"no image")
    Image.fromarray(good[:10]).save(tmp_path / "in/d.png")
    assert "Image '" in (said := refused(teacher, capsys, tmp_path / "in", tmp_path / "out")) and "b.png'" in said
    assert not contents(tmp_path / "out")
    output = embed(teacher, tmp_path / "in", tmp_path / "out", "--skip-damaged")
    assert "2 tiles could not be read" in capsys.readouterr().err
    assert rows_of(output)[0]["name"].to_pylist() == ["a.png", "c.png"]
    corrupt = json.loads(pq.read_metadata(output / "part-000000.parquet").metadata[b"damaged"])
    assert "b.png" in corrupt[0] and "56 x 10 px, less than a patch of 14" in corrupt[1]


def test_embeddings_that_overflow(teacher, images, tmp_path, capsys):
    state = {key: value.clone() for key, value in teacher[1].state_dict().items()}
    state["norm.weight"] *= 1e6
    torch.save(state, tmp_path / "large.pth")
    (tmp_path / "large.json").write_text(teacher[0].with_suffix(".json").read_text())
    forget(tmp_path / "large.pth")
    large, options = (tmp_path / "large.pth",), ("--kind", "images", "--store", "fp16")
    said = refused(large, capsys, images[0], tmp_path / "out", *options)
    assert "a/00.png is not finite in fp16; --dtype fp32 with --store fp32" in said
