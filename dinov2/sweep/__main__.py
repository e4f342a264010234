"""Train the runs of a sweep one after another and compare them: ``python -m dinov2.sweep SWEEP --output DIR``.

A sweep is a YAML file: a recipe, variants of it, and seeds. All runs are checked before the first one starts; finished
ones are passed over, and an interrupted one goes on from its checkpoint. At the end there are a page of all runs, and a
table of probes and final losses with the spread over seeds.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from dinov2.configs.files import sweeps
from dinov2.sweep.plan import Sweep, read
from dinov2.utils.cli import FAILURES, at_least, command_parser, run_command
from dinov2.utils.files import locked

logger = logging.getLogger("sweep")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser(
        "python -m dinov2.sweep",
        "\n".join(line for line in __doc__.partition("\n\n")[2].splitlines()),
        "kde data.path=/data/tiles --output output_kde",
        "my_sweep.yaml --processes 8 --seeds 0,1,2",
        "kaiko_ffpe_ff ffpe:data.path=/data/ffpe both:data.path=/data/all --slurm",
    )
    add = parser.add_argument
    add("sweep", metavar="SWEEP", help=f"YAML file, or shipped sweep: {', '.join(sweeps())}")
    text = "for all runs, or as NAME:section.key=value for those of a variant or phase"
    add("overrides", nargs="*", metavar="section.key=value", help=text)
    add("--output", type=Path, metavar="DIR", help="folder of the runs (default: output_SWEEP)")
    add("--seeds", type=_seeds, default=(), metavar="S[,S...]", help="in place of the file's")
    add("--processes", type=at_least(1), default=1, metavar="N", help="that train each run, a GPU each (%(default)s)")
    add("--no-check", action="store_true", help="start without a dry run of each variant, which opens the data")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the command of each run, and train nothing")
    what.add_argument("--slurm", action="store_true", help="check, and print a script for sbatch: an array of all runs")
    what.add_argument("--report", action="store_true", help="write page and table of what is there, and train nothing")
    text = "train only one variant with one seed, as a task of that array does"
    what.add_argument("--task", type=at_least(0), metavar="N", help=text)
    args = parser.parse_intermixed_args(argv)
    args.output = args.output and args.output.expanduser()
    return args


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(map(int, text.split(",")))
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"it is {text}, but different numbers of at least 0 are expected")
    return seeds


_seeds.__name__ = "list of seeds"  # what argparse calls it where a text is none


def compare(args: argparse.Namespace) -> int | None:
    """Do what the arguments ask for; returns the exit status."""
    sweep = read(args.sweep, args.output, args.overrides, args.seeds, args.processes)
    if args.task is not None and args.task >= len(sweep.tasks):
        raise ValueError(f"--task is {args.task}, but the sweep has tasks 0 to {len(sweep.tasks) - 1}.")
    if args.report:
        _report(sweep)
        return None
    from dinov2.sweep.launch import check_begun, check_data, command, slurm_script, train

    if args.print:
        sys.stdout.writelines(f"{shlex.join(command(sweep, run, args.processes))}\n" for run in sweep.runs)
        return None
    sweep.output.mkdir(parents=True, exist_ok=True)
    busy = f"'{sweep.output}' is in use by {{holder}}; wait for that to end, or give another --output."
    # The tasks of an array work side by side; each run's folder has a lock of its own.
    alone = (
        nullcontext() if args.task is not None else locked(sweep.output / ".lock", busy=busy, holder="another sweep")
    )
    with alone:
        check_begun(sweep, args.processes)
        if not args.no_check and args.task is None:
            check_data(sweep, args.processes)
        if args.slurm:
            sys.stdout.write(slurm_script(sweep, args.processes, _repeated(args, sweep)))
            return None
        numbers = range(len(sweep.runs)) if args.task is None else sweep.tasks[args.task]
        failed = train(sweep, [sweep.runs[number] for number in numbers], args.processes)
        if args.task is not None:
            return next(iter(failed.values()), None)
        _report(sweep)
    if failed:
        logger.error("Failed: %s. The same command tries them again.", ", ".join(failed))
    return FAILURES if failed else None


def _report(sweep: Sweep) -> None:
    from dinov2.sweep.results import TABLE, write_results

    page = write_results(sweep)
    logger.info("%s\nPage: %s", (sweep.output / TABLE).read_text(), page)


def _repeated(args: argparse.Namespace, sweep: Sweep) -> list[str]:
    """The arguments that say which runs there are, for a command line of another machine."""
    seeds = ["--seeds", ",".join(map(str, args.seeds))] if args.seeds else []
    place = ["--output", str(sweep.output), "--processes", str(args.processes)]
    return [str(sweep.file), *place, *seeds, *args.overrides]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `dinov2.utils.cli.run_command`."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    return run_command(lambda: compare(args), logger, resumable=True)


if __name__ == "__main__":
    sys.exit(main())
