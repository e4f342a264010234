"""What a teacher's features are worth: ``python -m dinov2.eval.probe --checkpoint T --data ROOT [...]``.

Embeds labelled tiles and probes the features: k-NN, linear heads, few-shot, RankMe, ODCorr. Under ``torchrun`` all
processes share the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dinov2.distributed import (
    MainProcessError,
    destroy_process_group,
    init_process_group,
    is_main_process,
    on_main_process,
)
from dinov2.eval.datasets.benchmarks import BENCHMARKS
from dinov2.eval.datasets.labelled import GROUPINGS, LabelledTiles
from dinov2.eval.datasets.labels import open_labelled_tiles
from dinov2.eval.feature_extraction import POOLINGS, Embedding
from dinov2.eval.probe.options import PROBES, Probing
from dinov2.eval.probe.results import Result, append_csv, as_table, write_json
from dinov2.eval.probe.run import run_probes
from dinov2.eval.probe.slides import AGGREGATIONS
from dinov2.hub import load_teacher, trained_with
from dinov2.logging import setup_logging
from dinov2.utils.dtypes import DTYPES
from dinov2.utils.environment import DeviceError, select_device

USER_ERROR = 2
"""Exit status where one sentence has said what the user can mend."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.eval.probe", description="Probe a teacher's features on labelled tiles."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="teacher: a file that dinov2.hub.load_teacher opens")
    add(
        "--data", required=True, nargs="+", metavar="[NAME=]ROOT",
        help=f"folder of class folders or of Parquet shards; {', '.join(BENCHMARKS)} as NAME take their own layout "
        "and split",
    )  # fmt: skip
    add("--labels", metavar="CSV", help="file,label[,slide,patient,split] or slide_id,label[,patient,split]")
    add("--slide-regex", metavar="RE", help="group 1 is a tile's slide (default: its parent folder)")
    add(
        "--probes", default=",".join(PROBES), help="comma-separated; linear is both linear ones (%(default)s)"
    )
    add("--output", type=Path, metavar="FILE", help=".csv, appended to, or a new .json")
    _add_numbers(parser)
    return parser.parse_args(argv)


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    default, add = Probing(), parser.add_argument
    add("--folds", type=int, default=default.folds, help="where tiles have no split (%(default)s)")
    add("--group", choices=GROUPINGS, help="never parted by folds (default: the widest known)")
    add(
        "--aggregate",
        choices=AGGREGATIONS,
        default=default.aggregation,
        help="for labels per slide (%(default)s)",
    )
    add("--runs", type=int, default=default.runs, help="linear heads of different seeds (%(default)s)")
    add("--steps", type=int, default=default.steps, help="of a linear head, at most (%(default)s)")
    add("--draws", type=int, default=default.draws, help="of few-shot (%(default)s)")
    add("--shots", type=_integers, default=default.shots, help="tiles per class of few-shot (1,4,16)")
    add("--neighbours", type=_integers, default=default.ks, metavar="K,..", help="of k-NN (5,20)")
    add("--limit", type=int, help="tiles taken of each split, at most (default: all)")
    add("--seed", type=int, default=default.seed, help="(%(default)s)")
    add("--pooling", choices=POOLINGS, default="cls", help="class token, or followed by the patches' mean")
    add("--size", type=int, help="side of the network's input (default: as trained, else 224)")
    add("--mean", type=float, nargs=3, help="per channel (default: as trained, else ImageNet's)")
    add("--std", type=float, nargs=3, help="per channel (default: as trained, else ImageNet's)")
    add("--batch-size", type=int, default=64, help="tiles per forward pass (%(default)s)")
    add("--autocast", choices=("bf16", "fp16"), help="dtype of the products (default: float32)")
    add("--device", help="cpu, cuda or cuda:N (default: the GPU where there is one)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for what the user can mend)."""
    args = parse_args(argv)
    logger = setup_logging()
    try:
        device = _device(args.device)
        init_process_group(device)
        logger = setup_logging()
        results = _probe(args, device)
        if is_main_process():
            sys.stdout.write(as_table(results) + "\n")
    except MainProcessError:
        time.sleep(1)  # torchrun ends all processes as soon as one has left, and rank 0 has something to say
        return USER_ERROR
    except (ValueError, OSError, ImportError, DeviceError) as error:
        logger.error("%s", error)
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR
    finally:
        destroy_process_group()
    return 0


def _probe(args: argparse.Namespace, device: torch.device) -> list[Result]:
    probing = Probing(
        probes=tuple(name.strip() for name in args.probes.split(",")), ks=args.neighbours, shots=args.shots,
        draws=args.draws, runs=args.runs, steps=args.steps, folds=args.folds, group=args.group,
        aggregation=args.aggregate, limit=args.limit, seed=args.seed,
    )  # fmt: skip
    on_main_process(lambda: _check_output(args.output))
    trained = trained_with(args.checkpoint)
    embedding = Embedding(
        pooling=args.pooling, batch_size=args.batch_size, autocast=DTYPES.get(args.autocast), show_progress=True,
        **{key: value for key in ("size", "mean", "std") if (value := getattr(args, key) or trained.get(key))},
    )  # fmt: skip
    tasks = open_tasks(args.data, args.labels, args.slide_regex)
    backbone = load_teacher(args.checkpoint).to(device)
    results = run_probes(backbone, tasks, embedding, probing, device)
    if args.output is not None:
        about = {
            "checkpoint": args.checkpoint,
            "step": trained.get("step"),
            "command": vars(args) | {"output": None},
        }
        on_main_process(lambda: _write(args.output, results, about))
    return results


def open_tasks(
    data: Sequence[str], labels: str | None = None, slide_regex: str | None = None
) -> dict[str, LabelledTiles]:
    """Tiles by task: ``NAME=ROOT`` opens the benchmark of that name, if there is one; ``ROOT`` is named by its folder.

    Raises:
        FileNotFoundError, ValueError: a root does not have the layout, or labels are given for several roots.
    """
    tasks: dict[str, LabelledTiles] = {}
    if labels is not None and len(data) > 1:
        raise ValueError(
            f"Labels '{labels}' are given for {len(data)} roots; one root is possible with labels."
        )
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


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _device(name: str | None) -> torch.device:
    if name is None:
        return select_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Device {name!r} is unknown; cpu, cuda or cuda:N is expected.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"Device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu."
        )
    return select_device() if name == "cuda" else device


def _check_output(output: Path | None) -> None:
    """Before the work, not after."""
    if output is None:
        return
    if output.suffix not in (".csv", ".json"):
        raise ValueError(f"Output '{output}' ends neither in .csv nor in .json.")
    if output.suffix == ".json" and output.exists():
        raise ValueError(f"Output '{output}' exists; name a new file, or a .csv to append to.")
    if output.suffix == ".csv":
        append_csv(output, [], None)


def _write(output: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    if output.suffix == ".csv":
        append_csv(output, results, about["step"])
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, results, about)


if __name__ == "__main__":
    sys.exit(main())
