"""Section ``performance`` decided: what is asked for, and what proves right on this device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dinov2.configs import Config
from dinov2.distributed import gather_objects, get_local_rank
from dinov2.train.performance.preflight import CHECKS, Check

_OLDEST_TORCH = (2, 11)
_REMEDIES = {
    "compile": "auto or false runs without",
    "fused_update": "auto or false updates the weights without",
    "attention": "sdpa lets PyTorch choose",
    "fp8": "none computes in 16 bit",
    "bf16": "set fp16 for every module and compute_precision.grad_scaler = true",
}


@dataclass(frozen=True)
class ResolvedPerformance:
    """Every ``auto`` of section ``performance`` decided.

    Attributes:
        compile: blocks and losses run through torch.compile.
        fused_update: clipping, AdamW, EMA and low-precision weights run as one Triton pass.
        attention_backend: kernel of attention.
        notes: a sentence for the log per ``auto`` that fell back.
    """

    compile: bool
    fused_update: bool
    attention_backend: str = "sdpa"
    notes: tuple[str, ...] = ()

    def applied(self, config: Config) -> Config:
        """The configuration to build networks from."""
        student = dataclasses.replace(config.student, attention_backend=self.attention_backend)
        return dataclasses.replace(config, student=student)


def resolve_performance(
    config: Config, device: torch.device, checks: Mapping[str, Check] = CHECKS
) -> ResolvedPerformance:
    """Decide every ``auto``, the same on all ranks, which must all call.

    On a GPU each switch that is on is checked, once per node: an ``auto`` (and attention that PyTorch chooses) falls
    back to the plain path, anything else is refused. Elsewhere ``auto`` is off, and what is asked for is checked but
    for compilation, which takes long there.

    Args:
        config: validated configuration.
        device: that trains.
        checks: by switch; see `CHECKS`.

    Raises:
        ValueError: if something cannot be used that is asked for; names all such.
    """
    performance, on_gpu = config.performance, device.type == "cuda"
    in_bf16, in_fp16 = (_keys_of_dtype(config, dtype) for dtype in ("bf16", "fp16"))
    requests = {
        "compile": ("performance.compile", performance.compile),
        "fused_update": ("performance.fused_update", performance.fused_update),
        "attention": ("student.attention_backend", config.student.attention_backend),
        "fp8": ("performance.fp8", performance.fp8),
        "bf16": (in_bf16[0], "bf16") if in_bf16 else ("", False),
    }
    on = {name: value not in (False, "none") for name, (_, value) in requests.items()}
    notes: list[str] = []
    for name, (_, value) in requests.items():
        on[name] &= on_gpu or value != "auto"
    scales_losses = config.compute_precision.grad_scaler and any(".student." in key for key in in_fp16)
    if on["fused_update"] and performance.fused_update == "auto" and scales_losses:
        on["fused_update"] = False
        notes.append("performance.fused_update = auto is off because fp16 needs loss scaling; bf16 does not.")

    faults = _torch_faults(torch.__version__)
    checked = [name for name in requests if on[name] and (on_gpu or name != "compile")]
    for name, problem in _problems(config, device, checks, checked).items():
        key, value = requests[name]
        if value in ("auto", "sdpa"):
            on[name] = False
            notes.append(f"{key} = {value} takes the slower plain path: {problem}.")
        else:
            value = str(value).lower()
            faults.append(f"{key} = {value} cannot be used: {problem.rstrip('.')}; {_REMEDIES[name]}.")
    if faults:
        raise ValueError(" ".join(faults))
    attention = config.student.attention_backend if on["attention"] else "math"
    return ResolvedPerformance(on["compile"], on["fused_update"], attention, tuple(notes))


def _problems(
    config: Config, device: torch.device, checks: Mapping[str, Check], names: list[str]
) -> dict[str, str]:
    """Problems by switch that any node has."""
    found: dict[str, str] = {}
    if get_local_rank() == 0:
        problems = {name: checks[name].problem(config, device) for name in names}
        found = {name: problem for name, problem in problems.items() if problem}
    everywhere: dict[str, str] = {}
    for of_rank in gather_objects(found):
        everywhere = of_rank | everywhere
    return everywhere


def _torch_faults(version: str) -> list[str]:
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found >= _OLDEST_TORCH:
        return []
    return [f"PyTorch {version} is too old: {'.'.join(map(str, _OLDEST_TORCH))} or newer is needed."]


def _keys_of_dtype(config: Config, dtype: str) -> list[str]:
    """Configuration keys of modules that compute in ``dtype``."""
    return [
        f"compute_precision.{network}.{module}.mixed_precision.param_dtype"
        for network in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
        if getattr(getattr(config.compute_precision, network), module).mixed_precision.param_dtype == dtype
    ]
