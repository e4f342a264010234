"""What this PyTorch and this GPU can do, against what a configuration asks for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dinov2.configs.schema import Config

_OLDEST_TORCH = (2, 11)
_FIRST_BF16 = _FIRST_FLASH = (8, 0)
_MODULES = ("backbone", "dino_head", "ibot_head")


@dataclass(frozen=True)
class Machine:
    """What decides; given by hand in tests.

    Attributes:
        torch: version.
        device: "cuda" or "cpu".
        capability: CUDA compute capability; None without a GPU.
        gpu: the driver's name of it.
        triton: Triton kernels run on the device (on a CPU: in Triton's interpreter).
        triton_lacks: why they do not, after "Triton, which".
        fp8_problem: why FP8 products cannot be used, in one sentence (`dinov2.layers.fp8.fp8_problem`); None where
            they can.
    """

    torch: str
    device: str
    capability: tuple[int, int] | None = None
    gpu: str = ""
    triton: bool = False
    triton_lacks: str = "is not installed"
    fp8_problem: str | None = None

    @classmethod
    def of(cls, device: torch.device, fp8_problem: str | None = None) -> Machine:
        """This machine, training on ``device``."""
        found = importlib.util.find_spec("triton") is not None
        if device.type != "cuda":
            interpreted = found and os.environ.get("TRITON_INTERPRET") == "1"
            return cls(torch.__version__, device.type, triton=interpreted, fp8_problem=fp8_problem)
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
        return cls(
            torch.__version__,
            device.type,
            torch.cuda.get_device_capability(device),
            torch.cuda.get_device_name(device),
            found and bool(compiler),
            "finds no C compiler (install gcc, or name one in CC)" if found else "is not installed",
            fp8_problem,
        )


@dataclass(frozen=True)
class ResolvedPerformance:
    """Every ``auto`` of section ``performance`` decided.

    Attributes:
        compile: blocks and losses run through torch.compile.
        fused_update: clipping, AdamW, EMA and copies run as one Triton pass.
        notes: a sentence for the log per ``auto`` that fell back on a GPU.
    """

    compile: bool
    fused_update: bool
    notes: tuple[str, ...] = ()


def capability_faults(config: Config, machine: Machine) -> list[str]:
    """One sentence per thing that the configuration asks for and the machine lacks, each with a remedy."""
    return [*_torch_faults(machine), *_dtype_faults(config, machine), *_attention_faults(config, machine),
            *_triton_faults(config, machine)]  # fmt: skip


def resolve_performance(config: Config, machine: Machine) -> ResolvedPerformance:
    """Decide every ``auto``: yes on a GPU with Triton, the fused update only without loss scaling.

    Raises:
        ValueError: all of `capability_faults`.
    """
    if faults := capability_faults(config, machine):
        raise ValueError(" ".join(faults))
    performance, notes = config.performance, []
    on_gpu = machine.device == "cuda"
    chosen = {"compile": on_gpu, "fused_update": on_gpu}
    for key in chosen:
        setting = getattr(performance, key)
        if setting != "auto":
            chosen[key] = setting
        elif on_gpu and not machine.triton and not (key == "compile" and _compiles_without_triton(config)):
            chosen[key] = False
            notes.append(
                f"performance.{key} = auto is off because Triton {machine.triton_lacks}; the step will be slower."
            )
    if performance.fused_update == "auto" and chosen["fused_update"] and _scales_losses(config):
        chosen["fused_update"] = False
        notes.append("performance.fused_update = auto is off because fp16 needs loss scaling; bf16 does not.")
    return ResolvedPerformance(**chosen, notes=tuple(notes))


def _torch_faults(machine: Machine) -> Iterator[str]:
    found = tuple(int(part) for part in re.findall(r"\d+", machine.torch)[:2])
    if found < _OLDEST_TORCH:
        yield f"PyTorch {machine.torch} is too old: {'.'.join(map(str, _OLDEST_TORCH))} or newer is needed."


def _dtype_faults(config: Config, machine: Machine) -> Iterator[str]:
    keys = _keys_of_dtype(config, "bf16")
    if keys and machine.capability is not None and machine.capability < _FIRST_BF16:
        yield (
            f"{keys[0]} = bf16, but {_gpu(machine)} has no bf16 products; set fp16 for every module and "
            "compute_precision.grad_scaler = true."
        )
    if config.performance.fp8 != "none" and machine.fp8_problem:
        yield (
            f"performance.fp8 = {config.performance.fp8} cannot be had: {machine.fp8_problem.rstrip('.')}; "
            "performance.fp8 = none computes in 16 bit."
        )


def _attention_faults(config: Config, machine: Machine) -> Iterator[str]:
    backend = config.student.attention_backend
    name = f"student.attention_backend = {backend}"
    if machine.device != "cuda":
        if backend in ("cudnn", "efficient", "xformers"):
            yield f"{name} needs a CUDA device and there is none; sdpa lets PyTorch choose."
        return
    if backend not in ("flash", "cudnn", "xformers"):
        return
    if backend != "xformers" and machine.capability < _FIRST_FLASH:
        yield f"{name} has no kernels for {_gpu(machine)}; sdpa lets PyTorch choose."
    in_fp32 = [key for key in _keys_of_dtype(config, "fp32") if key.split(".")[2] == "backbone"]
    if backend != "xformers" and in_fp32:
        yield f"{name} computes in 16 bit, while {in_fp32[0]} = fp32; choose sdpa, or bf16."


def _triton_faults(config: Config, machine: Machine) -> Iterator[str]:
    if machine.triton:
        return
    performance = config.performance
    if performance.fused_update is True:
        lacking = (
            f"Triton, which {machine.triton_lacks}" if machine.device == "cuda" else "a GPU and there is none"
        )
        yield f"performance.fused_update = true needs {lacking}; auto or false updates the weights without."
    if performance.compile is True and machine.device == "cuda" and not _compiles_without_triton(config):
        yield (
            f"performance.compile = true needs Triton, which {machine.triton_lacks}; set auto or false to run "
            "without."
        )


def _compiles_without_triton(config: Config) -> bool:
    return config.debug.compile_backend != "inductor"


def _scales_losses(config: Config) -> bool:
    in_fp16 = any(key.split(".")[1] == "student" for key in _keys_of_dtype(config, "fp16"))
    return in_fp16 and config.compute_precision.grad_scaler


def _keys_of_dtype(config: Config, dtype: str) -> list[str]:
    """Configuration keys of modules that compute in ``dtype``."""
    return [
        f"compute_precision.{network}.{module}.mixed_precision.param_dtype"
        for network in ("student", "teacher")
        for module in _MODULES
        if getattr(getattr(config.compute_precision, network), module).mixed_precision.param_dtype == dtype
    ]


def _gpu(machine: Machine) -> str:
    return f"{machine.gpu or 'this GPU'} (compute capability {'.'.join(map(str, machine.capability))})"
