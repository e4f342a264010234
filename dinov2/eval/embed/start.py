"""Embedding from its start to its end: device, processes, input, teacher, output. Imports torch."""

import argparse
import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from dinov2.data.images.hdf5 import import_h5py
from dinov2.data.slides.tissue import rule_of_options
from dinov2.distributed import destroy_process_group, get_global_rank, get_global_size, on_main_process, process_group
from dinov2.eval.embed.inputs import Grid, open_input
from dinov2.eval.embed.run import DESCRIPTION, Fitting, Output, embed_parts
from dinov2.eval.features import Embedding
from dinov2.hub import load_teacher, trained_with
from dinov2.hub.locate import teacher_file
from dinov2.hub.pretrained import local_weights
from dinov2.hub.record import normalisation
from dinov2.hub.teacher import describe
from dinov2.logging import setup_logging
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.environment import memory_advice, select_device
from dinov2.utils.files import locked
from dinov2.utils.launch import join_launch
from dinov2.utils.provenance import package_versions

_FORMAT_VERSION = 2  # of what is written under given options; raise it when that changes

logger = logging.getLogger("dinov2")


def start(args: argparse.Namespace) -> None:
    """Run the command whose arguments these are, in each of its processes."""
    join_launch()
    device = select_device(args.device)
    advice = f"--batch-size {args.batch_size} is too much, take a smaller one"
    with process_group(device), memory_advice(advice):
        setup_logging()
        _embed(args, device)


def _embed(args: argparse.Namespace, device: torch.device) -> None:
    if args.format == "hdf5":
        import_h5py()
    args.checkpoint = teacher_file(args.checkpoint)
    stride = args.tile_size if args.stride is None else args.stride
    grid = Grid(args.mpp, args.tile_size, stride, args.min_tissue, rule_of_options(args), args.mpp_tolerance)
    location, target = Path(args.input).expanduser().resolve(), args.output.resolve()
    if location.is_dir() and target.is_relative_to(location):
        raise ValueError(
            f"Output '{args.output}' lies in the input '{args.input}', which it would change; give another folder."
        )
    tables = args.mpp_file, args.slide_root
    source = on_main_process(lambda: open_input(args.input, args.kind, grid, args.rows_per_file, *tables))
    backbone = load_teacher(args.checkpoint).to(device)
    patch, width = backbone.patch_size, backbone.embed_dim * (2 if args.pooling == "cls_mean" else 1)
    fitting = Fitting(patch, args.image_size)
    if source.kind == "slides" and args.image_size is None and grid.tile_size % patch:
        raise ValueError(
            f"--tile-size is {grid.tile_size}, but the network takes multiples of its patch size {patch}; choose one, "
            "or add --image-size."
        )
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    stored = args.store or ("fp32" if dtype == "fp32" or args.format == "hdf5" else "fp16")
    mean, std, origin = normalisation(args.checkpoint, args.mean, args.std)
    logger.info("Images are normalised with %s.", origin)
    with local_weights(args.checkpoint).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # All that the embeddings depend on; the names are those of folders that have been begun.
    identity = {
        "version": _FORMAT_VERSION,
        "checkpoint_sha256": digest,
        "architecture": describe(backbone),
        "output_tokens": args.pooling,
        "dtype": dtype, "stored": stored, "mean": mean, "std": std, "resize": args.image_size,
        "format": args.format, "input": source.fingerprint, "kind": source.kind,
    }  # fmt: skip
    if source.kind == "slides":
        identity |= asdict(grid)
    else:
        identity["rows_per_file"] = args.rows_per_file
    output = Output(args.output, args.format, stored, width, json.loads(json.dumps(identity)))
    about = {
        "checkpoint": args.checkpoint, "step": trained_with(args.checkpoint).get("step"), "input": args.input,
        "device": str(device), "versions": package_versions(),
    }  # fmt: skip
    missing = on_main_process(lambda: output.prepare(source.parts, about))
    if len(missing) < len(source.parts):
        logger.info("%d of %d files are there already.", len(source.parts) - len(missing), len(source.parts))
    rank, world = get_global_rank(), get_global_size()
    destroy_process_group()  # processes have nothing to say to each other from here on, and may end hours apart
    embedding = Embedding(
        args.pooling, batch_size=args.batch_size, mean=mean, std=std, show_progress=rank == 0,
        autocast=None if dtype == "fp32" else DTYPES[dtype],
    )  # fmt: skip
    with locked(args.output / DESCRIPTION, rank):
        own = missing[rank::world]
        embed_parts(source, own, output, backbone, embedding, fitting, args.workers, args.skip_damaged)
