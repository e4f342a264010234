"""The command ``pathfm``: one name for each of the commands, which are imported when they are asked for."""

import difflib
import logging
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path

import dinov2
from dinov2.utils.cli import DONE, INTERRUPTED, USER_ERROR, run_command, started_as

COMMANDS = {
    "train": ("dinov2.train.train:main", "train a model, or resume it"),
    "tiles list": ("prepatching_scripts.create_sample_dataset_txt:main", "draw tissue tiles from slides and list them"),
    "tiles cut": ("prepatching_scripts.build_parquet_sample_dataset:main", "cut a list's tiles into Parquet shards"),
    "tiles index": ("prepatching_scripts.index_slides:main", "index slides once, so that readers need not parse them"),
    "tiles download": ("prepatching_scripts.download_tcga:main", "download TCGA slides"),
    "pack": ("dinov2.data.pack.__main__:main", "pack single images into Parquet shards"),
    "inspect": ("dinov2.data.inspect.__main__:main", "look at a dataset as training would read it"),
    "stats": ("dinov2.stats.__main__:main", "mean and standard deviation of a dataset's colours, to normalise with"),
    "repack": ("dinov2.data.repack.__main__:main", "rewrite Parquet shards to small row groups"),
    "embed": ("dinov2.eval.embed.__main__:main", "embed images, Parquet shards or slides with a teacher"),
    "probe": ("dinov2.eval.probe.__main__:main", "probe a teacher's features on labelled tiles"),
    "export": ("dinov2.export:main", "write a teacher for timm, transformers, ONNX Runtime or Meta's code"),
    "compare": ("dinov2.sweep.__main__:main", "train variants of a recipe with several seeds, and compare them"),
    "report": ("dinov2.report.__main__:main", "a page about one or several runs"),
    "eva": ("dinov2.eval.eva_cli:main", "stock kaiko-eva on a teacher"),
    "eva summary": ("dinov2.eval.eva_summary:main", "one table of what scripts/run_eva.sh has found"),
    "hest": ("HEST_evaluation:main", "HEST-Benchmark on a teacher"),
    "demo": ("dinov2.command:demo", "from a slide to a trained teacher, in minutes on a CPU"),
}
"""``module:function``, which takes the arguments and returns an exit status, and one line of help; by one or two words.
"""

_EXAMPLES = (
    "  pathfm train --help",
    "  pathfm train --config-file vits14_reg4 --output-dir output data.path=/data/tiles",
)

logger = logging.getLogger("pathfm")


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments over to the command that they begin with; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help(COMMANDS))
        return DONE
    if words[0] == "--version":
        sys.stdout.write(f"pathfm {dinov2.__version__}\n")
        return DONE
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if name is None:
        group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
        if group and words[1:2] in ([], ["-h"], ["--help"]):
            sys.stdout.write(_help(group))
            return DONE
        given = " ".join(words[:2] if group else words[:1])
        near = difflib.get_close_matches(given, group or COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(group or COMMANDS)}."
        sys.stderr.write(f"There is no command pathfm {given}; {hint}\n")
        return USER_ERROR
    module, _, function = COMMANDS[name][0].partition(":")
    arguments = words[len(name.split()) :]
    try:
        with started_as(f"pathfm {name}"):
            return getattr(import_module(module), function)(arguments)
    except KeyboardInterrupt:  # before or after what the command does itself about it
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED


def demo(argv: Sequence[str]) -> int:
    """Run ``run_demo.sh``, which a checkout of the repository has."""
    script = Path(__file__).parents[1] / "run_demo.sh"

    def run() -> None:
        if argv:
            raise ValueError(
                f"pathfm demo takes no arguments; it is given {' '.join(argv)}. OUTPUT_DIR names its folder."
            )
        if not script.is_file():
            raise FileNotFoundError(f"There is no '{script}': the demo runs in a checkout of the repository.")
        os.execv(script, [str(script)])

    if {"-h", "--help"} & set(argv):
        line = COMMANDS["demo"][1]
        sys.stdout.write(f"usage: pathfm demo\n\n{line}\n\nexamples:\n  OUTPUT_DIR=output_demo pathfm demo\n")
        return DONE
    return run_command(run, logger)


def _help(names: Collection[str]) -> str:
    """List some commands."""
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {COMMANDS[name][1]}" for name in names]
    examples = _EXAMPLES if len(names) == len(COMMANDS) else [f"  pathfm {next(iter(names))} --help"]
    return "\n".join(["usage: pathfm COMMAND [...]", "", "commands:", *lines, "", "examples:", *examples, ""])


if __name__ == "__main__":
    sys.exit(main())
