"""Stock kaiko-eva on a teacher: ``python -m dinov2.eval.eva_cli predict_fit --config eval_configs/bach.yaml``.

Registers the backbone ``pathfm/teacher``, fills in what eva's configurations read from the environment and hands over
to eva's own command line, of whose subcommands and options all work. ``check`` in place of a subcommand only looks
whether the checkpoint and the device are usable.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dinov2.hub import load_teacher, trained_with
from dinov2.logging import setup_logging

BACKBONE = "pathfm/teacher"
USER_ERROR = 2
"""Exit status where one sentence has said what the user can mend."""
_CONFIGS = Path(__file__).parents[2] / "eval_configs"

logger = logging.getLogger("dinov2")


def teacher(checkpoint_path: str, output: str = "cls", out_indices: int | None = None) -> nn.Module:
    """The backbone as eva's registry makes it. (No ``**kwargs``: eva passes on what the signature names.)

    Args:
        checkpoint_path: any file that `dinov2.hub.load_teacher` opens.
        output: "cls" for embeddings (B, D), "cls_mean" for (B, 2D).
        out_indices: 1 for what segmentation needs: a list with the un-normalised map (B, D, H/p, W/p) of the last
            block, whatever ``output`` says.

    Raises:
        ValueError: another number of maps.
    """
    if out_indices is None:
        return load_teacher(checkpoint_path, output=output)
    if int(out_indices) != 1:
        raise ValueError(
            f"OUT_INDICES is {out_indices}; a teacher gives the map of its last block, so 1 is expected."
        )
    return load_teacher(checkpoint_path, feature_map=True)


def fill_in(environment: MutableMapping[str, str]) -> None:
    """Set what the configurations read and the user left out.

    From ``CHECKPOINT_PATH`` and ``EMBEDDING`` ("cls", "cls_mean") follow MODEL_NAME, MODEL_EXTRA_KWARGS, IN_FEATURES
    (width of an embedding), MAP_FEATURES (width of a feature map), and NORMALIZE_MEAN and NORMALIZE_STD where the JSON
    beside the file states them. With another MODEL_NAME, or with MODEL_EXTRA_KWARGS set, nothing is filled in.

    Raises:
        ValueError: a variable is missing or has no meaning, or the checkpoint holds no teacher.
        OSError: there is no such checkpoint.
    """
    accelerator = environment.get("ACCELERATOR", "auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"ACCELERATOR={accelerator} asks for a GPU and none is usable; leave it out or set it to cpu."
        )
    if environment.setdefault("MODEL_NAME", BACKBONE) != BACKBONE or "MODEL_EXTRA_KWARGS" in environment:
        return
    path, output = environment.get("CHECKPOINT_PATH"), environment.get("EMBEDDING", "cls")
    if not path:
        raise ValueError("CHECKPOINT_PATH is not set; name a teacher's file.")
    if output not in ("cls", "cls_mean"):
        raise ValueError(f"EMBEDDING={output} is neither cls nor cls_mean.")
    width = load_teacher(path).embed_dim
    path = path if "://" in path else str(Path(path).resolve())
    found = {
        "MODEL_EXTRA_KWARGS": json.dumps({"checkpoint_path": path, "output": output}),
        "IN_FEATURES": str(width * (2 if output == "cls_mean" else 1)),
        "MAP_FEATURES": str(width),
    }
    trained = trained_with(path)
    found |= {
        f"NORMALIZE_{key.upper()}": json.dumps(trained[key]) for key in ("mean", "std") if key in trained
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def check_inputs(arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Look whether the configuration and the data are there before eva is loaded.

    Raises:
        FileNotFoundError: there is no such configuration or folder of data.
        ValueError: ``DATA_ROOT`` is not set.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    for config in parser.parse_known_args(arguments)[0].config:
        if "://" not in config and not Path(config).is_file():
            known = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))
            raise FileNotFoundError(f"Configuration '{config}' does not exist; eval_configs/ has {known}.")
    root = environment.get("DATA_ROOT")
    if not root:
        raise ValueError("DATA_ROOT is not set; name the folder of the data set, see docs/evaluation.md.")
    if environment.get("DOWNLOAD_DATA", "").lower() != "true" and not Path(root).is_dir():
        raise FileNotFoundError(
            f"DATA_ROOT={root} is not a folder; docs/evaluation.md says what it should hold."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run eva; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    try:
        if arguments and not {"-h", "--help", "--version"} & set(arguments):
            if arguments != ["check"]:
                check_inputs(arguments, os.environ)
            fill_in(os.environ)
        run = _registered()
    except (ImportError, OSError, ValueError) as error:
        logger.error("%s", error)
        logger.debug("Raised here:", exc_info=True)
        return USER_ERROR
    if arguments == ["check"]:
        logger.info("Evaluating on the %s.", "GPU" if torch.cuda.is_available() else "CPU: no GPU is usable")
        return 0
    sys.argv = ["eva", *arguments]  # eva's callbacks read the configuration's name there, too
    run()
    return 0


def _registered() -> Callable[[], None]:
    """Eva's own entry point, once it knows the backbone."""
    try:
        from eva.__main__ import main as run
        from eva.vision.models.networks.backbones import backbone_registry
    except ImportError as error:
        raise ImportError(
            f"kaiko-eva cannot be imported ({error}); PATHFM_EXTRAS=dev,slides,eval ./install.sh installs it."
        ) from error
    if BACKBONE not in backbone_registry.entries():
        backbone_registry.register(BACKBONE)(teacher)
    return run


if __name__ == "__main__":  # eva starts processes with "spawn", which import this module again
    sys.exit(main())
