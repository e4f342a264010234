"""The body of ``dinov2.eval.probe``: a teacher, perhaps beside another one, on labelled tiles."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dinov2.distributed import is_main_process, on_main_process, process_group
from dinov2.eval.datasets.benchmarks import BENCHMARKS
from dinov2.eval.datasets.images import ChosenTiles
from dinov2.eval.datasets.labels import LabelledTiles, open_labelled_tiles
from dinov2.eval.descriptors import DESCRIPTORS, Descriptor, flat_grey
from dinov2.eval.features import Embedding
from dinov2.eval.probe.options import Probing, option_flags, options_for
from dinov2.eval.probe.results import append_csv, as_table, write_json
from dinov2.eval.probe.run import run_probes
from dinov2.eval.probe.start import RANDOM, random_start
from dinov2.hub import load_teacher, trained_with
from dinov2.hub.locate import teacher_file
from dinov2.hub.record import normalisation
from dinov2.logging import setup_logging
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.environment import memory_advice, select_device
from dinov2.utils.launch import join_launch


def run(args: argparse.Namespace) -> None:
    """Do what the command's arguments say; raises ValueError, OSError and ImportError with a sentence each."""
    join_launch()
    device = select_device(args.device)
    advice = f"--batch-size {args.batch_size} or --limit is too much, take a smaller one"
    with process_group(device), memory_advice(advice):
        setup_logging()
        _probe(args, device)


def _probe(args: argparse.Namespace, device: torch.device) -> None:
    probing = Probing(
        probes=tuple(name.strip() for name in args.probes.split(",")),
        options=options_for(**{name: getattr(args, name) for name in option_flags()}),
        folds=args.folds, group=args.group, aggregation=args.aggregate, limit=args.limit, seed=args.seed,
    )  # fmt: skip
    if args.output is not None:
        on_main_process(lambda: _check_output(args.output))
    tasks = open_tasks(args.data, args.labels, args.slide_regex)
    if args.grey:
        for name, tiles in list(tasks.items()):
            grey = ChosenTiles(tiles.images, range(len(tiles.images)), flat_grey)
            tasks[f"{name}_grey"] = replace(tiles, images=grey)
    args.checkpoint = _teacher_file(args.checkpoint)
    args.compare = args.compare and _teacher_file(args.compare)
    backbone, embedding, step = _open_teacher(args.checkpoint, args, device)
    compared = None if args.compare is None else _open_teacher(args.compare, args, device)
    results = run_probes(backbone, tasks, embedding, probing, compared and compared[:2])
    if args.output is not None:
        about = {"checkpoint": args.checkpoint, "step": step, "command": vars(args) | {"output": None}}
        if compared:
            about |= {"compare": args.compare, "compare_step": compared[2]}
        if args.output.suffix == ".csv":
            on_main_process(lambda: append_csv(args.output, results, step))
        else:
            on_main_process(lambda: write_json(args.output, results, about))
    if is_main_process():
        sys.stdout.write(as_table(results) + "\n")


def _open_teacher(
    checkpoint: str, args: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Embedding, int | None]:
    """The backbone, how tiles become its features, and the step that it is of, where that is known."""
    if checkpoint in DESCRIPTORS:
        size = args.image_size or 224
        return Descriptor(checkpoint).to(device), Embedding("cls", size, args.batch_size, (0,) * 3, (1,) * 3), None
    if checkpoint.startswith(RANDOM):
        backbone, trained = random_start(checkpoint.removeprefix(RANDOM))
    else:
        backbone, trained = load_teacher(checkpoint), trained_with(checkpoint)
    mean, std, _ = normalisation(checkpoint, args.mean or trained.get("mean"), args.std or trained.get("std"))
    embedding = Embedding(
        args.pooling, args.image_size or trained.get("size", 224), args.batch_size, mean, std,
        autocast=None if args.dtype == "fp32" else DTYPES[args.dtype], show_progress=True,
    )  # fmt: skip
    return backbone.to(device), embedding, trained.get("step")


def _teacher_file(checkpoint: str) -> str:
    start = RANDOM if checkpoint.startswith(RANDOM) else ""
    return start + teacher_file(checkpoint.removeprefix(start))


def open_tasks(
    data: Sequence[str], labels: str | None = None, slide_regex: str | None = None
) -> dict[str, LabelledTiles]:
    """Tiles by task, ``NAME=ROOT`` or ``ROOT``, named by its folder; NAME may be a benchmark, with its own layout."""
    if labels is not None and len(data) > 1:
        raise ValueError(f"Labels '{labels}' are given for {len(data)} roots; one root is possible with labels.")
    tasks: dict[str, LabelledTiles] = {}
    for item in data:
        name, equals, root = item.partition("=")
        if not equals or "/" in name:
            name, root = Path(item).resolve().name, item
        if name in tasks:
            raise ValueError(f"Two tasks are called {name!r}; name them, as in {name}2={root}.")
        if equals and name in BENCHMARKS:
            tasks[name] = BENCHMARKS[name](root)
        else:
            tasks[name] = open_labelled_tiles(root, labels, slide_regex)
    return tasks


def _check_output(output: Path) -> None:
    """Before the work, not after."""
    if output.suffix == ".csv":
        append_csv(output, [], None)
    elif output.suffix != ".json":
        raise ValueError(f"Output '{output}' ends neither in .csv nor in .json.")
    elif output.exists():
        raise ValueError(f"Output '{output}' exists; name a new file, or a .csv to append to.")
