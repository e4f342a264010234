"""Abilities of this PyTorch on this machine's GPUs; ``python -m dinov2.utils.environment`` reports it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dinov2.utils.cli import DeviceError
from dinov2.utils.provenance import package_versions

ALLOW_CPU = "PATHFM_ALLOW_CPU"
_REPORTED = ("torchvision", "numpy", "omegaconf", "pyarrow", "pillow", "opencv-python-headless", "xformers")


def select_device(name: str | None = None) -> torch.device:
    """Device of this process: its own GPU where one is usable, the CPU where the machine has none.

    The GPU is ``cuda:LOCAL_RANK``. An empty ``CUDA_VISIBLE_DEVICES`` chooses the CPU. ``name`` is ``cpu``, ``cuda`` for
    the process's own GPU, or ``cuda:N``, where the choice is not left to the machine. DeviceError if the machine has a
    GPU that this process cannot use, or not the one that is named; ``PATHFM_ALLOW_CPU=1`` gives the CPU instead.
    """
    if name is not None:
        match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
        if match is None:
            raise ValueError(f"Device {name!r} is unknown; cpu, cuda or cuda:N is expected.")
        device = select_device() if name == "cuda" else torch.device(name)
        if name != "cpu" and (device.type != "cuda" or device.index >= torch.cuda.device_count()):
            raise DeviceError(
                f"Device {name!r} is unavailable: PyTorch sees {torch.cuda.device_count() or 'no'} GPUs; --device cpu "
                "runs on the processor."
            )
        return device
    if _gpus_hidden():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    problem = gpu_problem(local_rank)
    if problem is None:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if os.environ.get(ALLOW_CPU) == "1":
        return torch.device("cpu")
    raise DeviceError(f"{problem} ({ALLOW_CPU}=1 runs on the CPU instead.)")


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn a GPU's lack of memory within the block into a DeviceError of one sentence, which ends in advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{'. '.join(str(error).split('. ')[:2])}; {advice}.") from error


def gpu_problem(index: int = 0) -> str | None:
    """Say why the GPU with this index cannot be used and what helps; None where it can, or is absent or hidden."""
    if _gpus_hidden():
        return None
    if not torch.cuda.is_available():
        if not nvidia_gpu_present():
            return None
        if torch.version.cuda is None:
            return (
                f"This machine has an NVIDIA GPU, but PyTorch {torch.__version__} is built without CUDA: "
                "run ./install.sh again where PyTorch's package index can be reached."
            )
        supported = re.search(r"CUDA (?:\w+ )?Version:\s*([\d.]+)", _nvidia_smi())
        driver = f"whose driver supports CUDA {supported[1]}" if supported else "whose driver does not answer"
        return (
            f"This machine has an NVIDIA GPU {driver}, which PyTorch {torch.__version__} with CUDA "
            f"{torch.version.cuda} cannot use: update the driver, give this container or job access to the GPU, "
            "or run ./install.sh again where PyTorch's package index can be reached."
        )
    if index >= torch.cuda.device_count():
        return (
            f"LOCAL_RANK {index} has no GPU of its own, {torch.cuda.device_count()} being visible: "
            "start at most one process per GPU or name more GPUs in CUDA_VISIBLE_DEVICES."
        )
    built_for = torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip or _runs_on((major, minor), built_for):
        return None
    return (
        f"GPU {index} is a {torch.cuda.get_device_name(index)} (sm_{major}{minor}), "
        f"and PyTorch {torch.__version__} is built for {' '.join(built_for)} only: "
        "hide it with CUDA_VISIBLE_DEVICES or install a PyTorch build that has it."
    )


def nvidia_gpu_present() -> bool:
    """Whether the machine shows an NVIDIA GPU, whatever PyTorch makes of it."""
    folders = (("/dev", "nvidia[0-9]*"), ("/proc/driver/nvidia/gpus", "*"))
    return any(any(Path(folder).glob(names)) for folder, names in folders) or "GPU " in _nvidia_smi("-L")


def main() -> int:
    """Print what was found; the exit status is 1 where the machine has GPUs and none of them is usable."""
    for name, version in package_versions(("path-fm", "torch", *_REPORTED)).items():
        print(f"{name} {version}")
    print(f"CUDA of this PyTorch: {torch.version.cuda or 'none'}")
    problems = [gpu_problem(index) for index in range(max(1, torch.cuda.device_count()))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        state = "usable" if problems[index] is None else "not usable"
        print(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {state}")
    if not torch.cuda.is_available():
        print("GPU: none in sight, training runs on the CPU" if problems == [None] else "GPU: not usable")
    for problem in filter(None, problems):
        print(problem, file=sys.stderr)
    return int(all(problems) and os.environ.get(ALLOW_CPU) != "1")


def _gpus_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _nvidia_smi(*arguments: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Machine code runs within its major version from its minor version on, PTX on everything newer."""
    matches = filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d)", name) for name in built_for))
    built = [(kind, (int(major), int(minor))) for kind, major, minor in (match.groups() for match in matches)]
    return any(version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in built)


if __name__ == "__main__":
    sys.exit(main())
