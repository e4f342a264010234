"""How much a recipe learns from scratch: python -m benchmarks.learn, see docs/experiments.md."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.learn.judge import SIZE, Folds, held_out_groups, photographs, weights_name
from benchmarks.learn.runs import PEERS, RECIPE, Budget, Commands, Model, Run, Sweep
from benchmarks.learn.summary import draw, summarise, tables
from benchmarks.machine import ROOT, describe_machine
from dinov2.logging import setup_logging
from dinov2.utils.cli import run_command
from dinov2.utils.files import check_description, replacing, write_json

logger = logging.getLogger("dinov2")

PACKAGES = ("torch", "numpy", "scikit-learn", "scikit-image", "opencv-python-headless")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train from scratch on labelled tiles, and judge what was learnt.")
    parser.add_argument("--tiles", type=Path, required=True, help="Parquet with image_bytes, label and patient")
    parser.add_argument("--config-file", required=True, help="the recipe")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--images", type=int, help="budget of each run in images")
    budget.add_argument("--core-minutes", type=float, help="budget of each run in minutes of one core, data included")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="keys of the recipe, its variants and the peers"
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "key=value"),
        help="recipe, and what differs",
    )
    parser.add_argument(
        "--peer", nargs="+", action="append", default=[], metavar=("NAME", "key=value"),
        help=f"other code at the same budget, one of {', '.join(PEERS)}; NAME:label tells two apart",
    )  # fmt: skip
    parser.add_argument("--peer-root", type=Path, help="folder of the peers' clones and their venv")
    parser.add_argument("--held-out", type=float, default=0.0, help="fraction of the photographs that is only judged")
    parser.add_argument("--image-size", type=int, default=SIZE, help="side in px at which tiles are judged")
    parser.add_argument("--bf16", action="store_true", help="judge in bf16, faster on CPUs with AMX")
    parser.add_argument("--exports", type=int, default=5, help="teachers judged over time, the last one among them")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    parser.add_argument("--output", type=Path, required=True, help="folder; finished runs in it are kept")
    return parser.parse_args(argv)


def models(args: argparse.Namespace) -> list[Model]:
    """The recipe, its variants and the peers. Raises ValueError where a name is unknown or stands twice."""
    found = [Model(RECIPE), *(Model(name, tuple(overrides)) for name, *overrides in args.variant)]
    for name, *overrides in args.peer:
        peer = name.partition(":")[0]
        if peer not in PEERS:
            raise ValueError(f"--peer {name} is none of {', '.join(PEERS)}.")
        if args.peer_root is None:
            raise ValueError(f"--peer {name} needs --peer-root, the folder of its code.")
        found.append(Model(name, tuple(overrides), peer))
    names = [model.name for model in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"Two runs are called {twice[0]!r}; give each variant and peer a name of its own.")
    return found


def tiles_to_train_on(args: argparse.Namespace, held_out: np.ndarray) -> Path:
    """The file of tiles, or a copy without the rows, bool (N,), that are only judged."""
    if not args.held_out:
        return args.tiles.resolve()
    path = args.output.resolve() / "tiles.parquet"
    if not path.exists():
        kept = pq.read_table(args.tiles).filter(pa.array(~held_out))
        with replacing(path) as partial:
            pq.write_table(kept, partial, row_group_size=64)
    return path


def run_all(runs: Sequence[Run], args: argparse.Namespace, commands: Commands) -> None:
    """Train and judge what is not done yet, some runs side by side."""
    judged = args.output.resolve() / "judged"
    options = ["--tiles", str(args.tiles.resolve()), "--output", str(judged)]
    options += ["--held-out", str(args.held_out), "--image-size", str(args.image_size)]
    options += ["--bf16"] if args.bf16 else []

    def judge(teachers: Sequence[Path], log: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.learn.judge", *options, *map(str, teachers)]
        commands.run(command, log, cwd=ROOT)

    def finish(run: Run) -> str:
        run.train(commands)
        if not all((judged / f"{weights_name(path)}.json").exists() for _, path in run.exports):
            judge([path for _, path in run.exports], run.folder / "judge.txt")
        return f"{run.model.name}, seed {run.seed}"

    if not (judged / "baselines.json").exists():
        judge([], args.output.resolve() / "baselines.txt")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(finish, run) for run in runs]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                logger.info("%d of %d done: %s.", number, len(runs), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            commands.close()
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; returns its exit status, see `run_command`."""
    args = parse_args(argv)
    setup_logging()
    return run_command(lambda: _run(args, sys.argv[1:] if argv is None else argv), logger, resumable=True)


def _run(args: argparse.Namespace, command: Sequence[str]) -> None:
    torch.set_num_threads(1)
    wanted, groups = models(args), photographs(args.tiles)
    held_out = np.isin(groups, held_out_groups(groups, args.held_out))
    args.output.mkdir(parents=True, exist_ok=True)
    identity = {"tiles": args.tiles.name, "rows": len(groups), "held_out": args.held_out, "size": args.image_size}
    identity |= {"set": args.set, "bf16": args.bf16}
    if not check_description(args.output / "build.json", identity):
        write_json(args.output / "build.json", {"build": identity})
    root = (args.peer_root or Path()).resolve()
    tiles, output = tiles_to_train_on(args, held_out), args.output.resolve()
    sweep = Sweep(args.config_file, tiles, output, root, args.exports, tuple(args.set))
    commands, runs = Commands(), []
    for model in wanted:
        images = args.images or 60 * args.core_minutes / sweep.seconds_per_image(model, commands)
        runs += [sweep.run(model, seed, images) for seed in range(args.seeds)]
    for run in runs:
        run.prepare()
    run_all(runs, args, commands)
    labels = pq.read_table(args.tiles, columns=["label"])["label"].to_numpy()
    if args.held_out:
        labels, groups = labels[held_out], groups[held_out]
    results = {"machine": describe_machine(PACKAGES), "command": ["python", "-m", "benchmarks.learn", *command]}
    results |= {"tiles": identity | {"judged": len(labels), "photographs": len(np.unique(groups))}}
    results |= {"budget": Budget(args.images, args.core_minutes)._asdict()}
    results |= summarise(runs, args.output / "judged", Folds(labels, groups))
    write_json(args.output / "results.json", results)
    for over in ("images", "cpu_s"):
        draw(results, args.output / f"over_{over}.png", over)
    sys.stdout.write(tables(results))


if __name__ == "__main__":
    sys.exit(main())
