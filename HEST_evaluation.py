"""HEST-Benchmark on a teacher: how well its features of a spot's tile predict gene expression there.

Runs in the environment that scripts/install_hest.sh makes; of ours it needs `dinov2.hub` only. See docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinov2.hub.locate import teacher_file
from dinov2.logging import setup_logging
from dinov2.utils import cli
from dinov2.utils.files import replacing, write_text

if TYPE_CHECKING:
    import torch

DATASETS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")
"""The nine tasks of the published averages; HEST has HCC, too."""
PUBLISHED = {
    "Midnight-92k/392, cls+mean": 0.415,  # Karasikov et al. 2025 (arXiv 2504.05186) and the model's page
    "Midnight-92k, cls+mean": 0.425,
    "Midnight-12k, cls+mean": 0.412,
    "OpenMidnight, cls": 0.390,  # Kaplan et al. 2025 (sophont.med/blog/openmidnight)
}
"""Published averages over `DATASETS`."""
_INSTALL = "scripts/install_hest.sh installs mahmoodlab/HEST into .venv-hest, to be run with its Python"

logger = logging.getLogger("dinov2")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.command_parser(
        "python HEST_evaluation.py",
        __doc__.split("\n")[0],
        "--checkpoint output/eval/training_12500 --output output_hest --pooling cls_mean",
    )
    cli.add_options(parser, "--checkpoint")
    add = parser.add_argument
    add("--datasets", nargs="+", default=list(DATASETS), metavar="NAME", help="(%(default)s)")
    add(
        "--bench-data", type=Path, default=Path("data/hest_bench"), metavar="DIR",
        help="where the benchmark's data are or go (%(default)s)",
    )  # fmt: skip
    add("--output", type=Path, default=Path("output_hest"), metavar="DIR", help="a new folder (%(default)s)")
    cli.add_options(parser, "--pooling")
    add("--latent-dim", type=cli.at_least(0), default=256, help="of the PCA before the ridge; 0: none (%(default)s)")
    add("--batch-size", type=cli.at_least(1), default=128, help="(%(default)s)")
    cli.add_options(parser, "--workers", type=cli.at_least(0), default=1)
    add("--offline", action="store_true", help="use what --bench-data has; download nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_arguments(argv)
    setup_logging()
    return cli.run_command(lambda: _evaluate(args), logger)


def _evaluate(args: argparse.Namespace) -> None:
    args.checkpoint = teacher_file(args.checkpoint)
    _check_folders(args)
    model, transform = _encoder(args)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    module = find_benchmark()
    results = run(module, model, transform, args)
    text = as_markdown(results, f"HEST: {Path(args.checkpoint).name}")
    with replacing(args.output / "hest.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("dataset", "mean", "sd"))
        writer.writeheader()
        writer.writerows(results)
    write_text(args.output / "hest.md", text)
    sys.stdout.write(text)


def find_benchmark() -> ModuleType:
    """HEST's module ``hest.bench.benchmark``. (As an attribute of `hest.bench` that name is the function.)

    Raises:
        ImportError: if HEST is not there, is another package of that name, or lacks a requirement.
    """
    try:
        return importlib.import_module("hest.bench.benchmark")
    except ImportError as error:
        if error.name not in ("hest", "hest.bench"):
            raise ImportError(f"HEST cannot be imported ({error}); {_INSTALL}.") from error
    try:
        found = importlib.metadata.version("hest")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"HEST is not installed; {_INSTALL}.") from None
    raise ImportError(
        f"The installed hest {found} is PyPI's HeST, a simulator of helium detectors, without hest.bench; {_INSTALL}."
    )


def run(
    module: ModuleType, model: torch.nn.Module, transform: Callable[[Any], torch.Tensor], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Benchmark through keyword arguments; returns ``dataset``, ``mean`` and ``sd`` over folds per task.

    Raises:
        OSError: if HEST left no results.
    """
    import torch

    # Neither the registry of weights, which only an editable installation has, nor the weights of other encoders, many
    # gigabytes, are of use to an encoder of one's own.
    module.get_bench_weights = lambda root, name: ""
    fetch = module.snapshot_download
    module.snapshot_download = lambda *a, **k: None if k.get("allow_patterns") == ["fm_v1/*"] else fetch(*a, **k)
    # Names that start with "./" would be relative to the package.
    folders = {name: (args.output / name).resolve() for name in ("weights", "embeddings", "results")}
    for folder in (*folders.values(), args.bench_data):
        folder.mkdir(parents=True, exist_ok=True)
    module.benchmark(
        model, transform, torch.float32,
        datasets=args.datasets, encoders=[],
        dimreduce="PCA" if args.latent_dim else "none", latent_dim=args.latent_dim or None,
        batch_size=args.batch_size, num_workers=args.workers, exp_code="teacher",
        bench_data_root=str(args.bench_data.resolve()), weights_root=str(folders["weights"]),
        embed_dataroot=str(folders["embeddings"]), results_dir=str(folders["results"]),
    )  # fmt: skip
    found = sorted(folders["results"].glob("teacher*/dataset_results.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"HEST left no dataset_results.json in '{folders['results']}'; see its output above.")
    return [
        {"dataset": task["dataset_name"], "mean": own["pearson_mean"], "sd": own["pearson_std"]}
        for task in json.loads(found[-1].read_text())["results"]
        for own in task["results"]
    ]


def as_markdown(results: Sequence[dict[str, Any]], title: str) -> str:
    """The table as a page; with all of `DATASETS`, and no other, beside the published averages."""
    lines = [f"# {title}", "", "| task | Pearson | sd over folds |", "| --- | --- | --- |"]
    lines += [f"| {row['dataset']} | {row['mean']:.4f} | {row['sd']:.4f} |" for row in results]
    if results:
        lines.append(f"| average | {sum(row['mean'] for row in results) / len(results):.4f} | |")
    if {row["dataset"] for row in results} == set(DATASETS):
        lines += [f"| average, {model} | {value:.3f} | |" for model, value in PUBLISHED.items()]
    return "\n".join(lines) + "\n"


def _check_folders(args: argparse.Namespace) -> None:
    """Refuse an output that holds something, and tasks whose data neither are there nor can be fetched."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise FileExistsError(f"--output '{args.output}' is not an empty folder; name a new one.")
    absent = [name for name in args.datasets if not (args.bench_data / name / "splits").is_dir()]
    known = [] if args.offline else [*DATASETS, "HCC"]
    if unknown := [name for name in absent if name not in known]:
        what = "offline, there is nothing else" if args.offline else f"what can be fetched is {', '.join(known)}"
        raise FileNotFoundError(f"--bench-data '{args.bench_data}' has no {', '.join(unknown)} with splits/; {what}.")


def _encoder(args: argparse.Namespace) -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
    """The teacher, (B, 3, 224, 224) to features, and what makes its input of HEST's images."""
    import torch
    from torchvision.transforms import Compose, Normalize, ToTensor

    from dinov2.hub import load_teacher
    from dinov2.hub.record import normalisation

    model = load_teacher(args.checkpoint, pooling=args.pooling)
    with torch.inference_mode():
        width = model(torch.zeros(1, 3, 224, 224)).shape[-1]
    if args.latent_dim > width:
        raise ValueError(
            f"--latent-dim {args.latent_dim} exceeds the {width} features of {args.pooling}; lower it, or 0: no PCA."
        )
    mean, std, _ = normalisation(args.checkpoint)
    return model, Compose([ToTensor(), Normalize(mean, std)])


if __name__ == "__main__":
    sys.exit(main())
