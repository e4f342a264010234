"""Embed images, Parquet datasets or slides: ``python -m dinov2.eval.embed --checkpoint T --input SRC --output OUT``.

The output is a folder of files, one per slide or per few thousand images, each written beside and renamed when whole:
the same command goes on where it was stopped. Under ``torchrun`` the processes share the files out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dinov2.data.augment.normalize import IMAGENET_MEAN, IMAGENET_STD
from dinov2.data.slides.tissue import TissueRule
from dinov2.distributed import (
    MainProcessError,
    destroy_process_group,
    get_global_rank,
    get_global_size,
    init_process_group,
    on_main_process,
)
from dinov2.eval.embed.files import ENDINGS, STORED, require_h5py
from dinov2.eval.embed.inputs import KINDS, TileInput, open_input
from dinov2.eval.embed.read_ahead import Embedder, Fitting
from dinov2.eval.embed.run import DESCRIPTION, Counts, Output, embed_parts
from dinov2.eval.embed.slides import Grid
from dinov2.hub import load_teacher, trained_with
from dinov2.hub.architecture import arguments_of
from dinov2.hub.pretrained import local_weights
from dinov2.logging import setup_logging
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.environment import DeviceError, select_device
from dinov2.utils.files import locked
from dinov2.utils.provenance import package_versions

USER_ERROR, STOPPED = 2, 130
"""Exit status where one sentence has said what the user can mend, and after Ctrl-C."""
_FORMAT_VERSION = 1  # of what is written under given options; raise it when that changes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.eval.embed",
        description="Embed images, Parquet datasets or slides with a teacher.",
    )
    add, grid = parser.add_argument, Grid()
    add("--checkpoint", required=True, help="teacher: a file or URL that dinov2.hub.load_teacher opens")
    add(
        "--input", required=True, metavar="SRC",
        help="folder (with subfolders) of images, Parquet shards or slides; one of these; a .txt or .csv list of "
        "slides; a glob, hub id or URL of Parquet shards",
    )  # fmt: skip
    add(
        "--output", required=True, type=Path, metavar="OUT", help="folder: new, empty, or of the same command"
    )
    add("--kind", choices=KINDS, help="of the input; needed for files of TIFF alone")
    add("--format", choices=ENDINGS, default="parquet", help="of the files (%(default)s)")
    add(
        "--output-tokens",
        choices=("cls", "cls_mean"),
        default="cls",
        help="class token, or followed by the mean patch token (%(default)s)",
    )
    add("--dtype", choices=DTYPES, help="of the products (bf16 on a GPU, fp32 on the CPU)")
    add("--store", choices=STORED, help="of the embeddings (fp32 for HDF5 and --dtype fp32, else fp16)")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
    add("--batch-size", type=int, default=64, help="tiles in a forward pass (%(default)s)")
    add("--workers", type=int, default=8, help="threads of each process that read (%(default)s)")
    add("--rows-per-file", type=int, default=2048, help="of images and Parquet rows (%(default)s)")
    add(
        "--resize",
        type=int,
        metavar="PX",
        help="scale the largest centred square; default: cut to whole patches",
    )
    add("--mean", type=float, nargs=3, help="per channel (default: as trained, else ImageNet's)")
    add("--std", type=float, nargs=3, help="per channel (default: as trained, else ImageNet's)")
    add("--skip-damaged", action="store_true", help="leave out and count what cannot be read")
    slides = parser.add_argument_group("slides")
    add = slides.add_argument
    add("--mpp", type=float, default=grid.mpp, help="um per px of the tiles (%(default)s)")
    add("--tile-size", type=int, default=grid.tile_size, help="side of a tile in px (%(default)s)")
    add("--stride", type=int, help="px from tile to tile (the tile size)")
    add(
        "--min-tissue",
        type=float,
        default=grid.min_tissue,
        help="least share of tissue in a tile (%(default)s)",
    )
    add("--mpp-file", type=Path, help="CSV 'slide,mpp' for slides that do not say theirs")
    args = parser.parse_args(argv)
    for name in ("batch_size", "workers", "rows_per_file"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for what the user can mend)."""
    args = parse_args(argv)
    logger = setup_logging()
    try:
        device = _device(args.device)
        init_process_group(device)
        logger = setup_logging()
        counts = _embed(args, device, logger)
    except MainProcessError:
        time.sleep(1)  # torchrun ends all processes as soon as one has left, and rank 0 has something to say
        return USER_ERROR
    except (ValueError, OSError, ImportError, DeviceError) as error:
        logger.error("%s", error)
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR
    except torch.OutOfMemoryError:
        logger.error(
            "--batch-size %d does not fit into the GPU's memory; take a smaller one.", args.batch_size
        )
        return USER_ERROR
    except KeyboardInterrupt:
        logger.error("Stopped; the same command goes on from here.")
        return STOPPED
    finally:
        destroy_process_group()
    if counts.damaged:
        logger.warning("%d tiles could not be read and were left out; their files say which.", counts.damaged)
    if counts.unreadable:
        logger.warning("%d parts could not be read: %s", len(counts.unreadable), counts.unreadable[0])
    logger.info("Wrote %d embeddings into %s.", counts.written, args.output)
    return 0


def _embed(args: argparse.Namespace, device: torch.device, logger: logging.Logger) -> Counts:
    if args.format == "hdf5":
        require_h5py()
    stride = args.tile_size if args.stride is None else args.stride
    grid = Grid(args.mpp, args.tile_size, stride, args.min_tissue)
    _refuse_overlap(args.input, args.output)
    source = on_main_process(
        lambda: open_input(args.input, args.kind, grid, args.rows_per_file, args.mpp_file)
    )
    model = load_teacher(args.checkpoint, output=args.output_tokens)
    backbone: DinoVisionTransformer = getattr(model, "backbone", model)
    fitting = Fitting(backbone.patch_size, args.resize)
    if source.kind == "slides" and args.resize is None and grid.tile_size % backbone.patch_size:
        raise ValueError(
            f"--tile-size is {grid.tile_size}, but the network takes multiples of its patch size "
            f"{backbone.patch_size}; choose one, or add --resize."
        )
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    stored = args.store or ("fp32" if dtype == "fp32" or args.format == "hdf5" else "fp16")
    mean, std = _colours(args, logger)
    how = {"dtype": dtype, "stored": stored, "mean": mean, "std": std, "resize": args.resize}
    output = on_main_process(lambda: _output(args, source, grid, backbone, how))
    missing = on_main_process(lambda: output.prepare(source.parts, _about(args, device)))
    if len(missing) < len(source.parts):
        logger.info("%d of %d files are there already.", len(source.parts) - len(missing), len(source.parts))
    rank, world = get_global_rank(), get_global_size()
    destroy_process_group()  # processes have nothing to say to each other from here on, and may end hours apart
    embedder = Embedder(model.to(device), mean, std, None if dtype == "fp32" else DTYPES[dtype])
    with locked(args.output / DESCRIPTION, rank):
        return embed_parts(
            source, missing[rank::world], output, embedder, fitting,
            batch_size=args.batch_size, workers=args.workers, skip_damaged=args.skip_damaged, show_progress=rank == 0,
        )  # fmt: skip


def _output(
    args: argparse.Namespace,
    source: TileInput,
    grid: Grid,
    backbone: DinoVisionTransformer,
    how: dict[str, Any],
) -> Output:
    """The output, identified by all that its embeddings depend on."""
    identity = {
        "version": _FORMAT_VERSION,
        "checkpoint_sha256": _sha256(args.checkpoint),
        "architecture": arguments_of(backbone),
        "output_tokens": args.output_tokens,
        **how,
        "format": args.format,
        "input": source.fingerprint,
        "kind": source.kind,
    }
    if source.kind == "slides":
        rule = TissueRule()
        identity |= asdict(grid) | {"tissue_hsv": [rule.lower, rule.upper]}
    else:
        identity["rows_per_file"] = args.rows_per_file
    width = backbone.embed_dim * (2 if args.output_tokens == "cls_mean" else 1)
    return Output(args.output, args.format, how["stored"], width, json.loads(json.dumps(identity)))


def _about(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the description says besides."""
    trained = trained_with(args.checkpoint)
    return {
        "checkpoint": args.checkpoint,
        "step": trained.get("step"),
        "input": args.input,
        "device": str(device),
        "versions": package_versions(),
    }


def _colours(args: argparse.Namespace, logger: logging.Logger) -> tuple[list[float], list[float]]:
    """Those asked for, or of training, or ImageNet's."""
    trained = trained_with(args.checkpoint)
    chosen, said = [], []
    for key, imagenet in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        sources = {"as asked": getattr(args, key), "of training": trained.get(key), "of ImageNet": imagenet}
        whose = next(name for name, value in sources.items() if value)
        chosen.append([float(value) for value in sources[whose]])
        said.append(f"{key} {chosen[-1]} {whose}")
    logger.info("Images are normalised with %s.", ", ".join(said))
    return chosen[0], chosen[1]


def _sha256(checkpoint: str) -> str:
    with local_weights(checkpoint).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_overlap(source: str, output: Path) -> None:
    place, target = Path(source).expanduser().resolve(), output.resolve()
    if place.is_dir() and (target == place or place in target.parents):
        raise ValueError(
            f"Output '{output}' lies in the input '{source}', which it would change; give another folder."
        )


def _device(name: str | None) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    device = select_device()
    if name == "cuda" and device.type != "cuda":
        raise DeviceError("--device is cuda, but PyTorch sees no GPU; --device cpu runs on the processor.")
    return device


if __name__ == "__main__":
    sys.exit(main())
