"""Section ``performance`` decided: what is asked for, and what proves right on this device."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter

import torch

from dinov2.configs import Config
from dinov2.distributed import gather_objects, get_local_rank
from dinov2.train.performance.preflight import CHECKS, Check

_OLDEST_TORCH = "2.11"
_FIRST_BF16 = (8, 0)  # compute capability


@dataclass(frozen=True)
class ResolvedPerformance:
    """Every ``auto`` of section ``performance`` decided."""

    compile: bool  # blocks and losses run through torch.compile
    fused_update: bool  # clipping, AdamW, EMA and low-precision weights run as one Triton pass
    attention_backend: str = "sdpa"
    notes: tuple[str, ...] = ()  # a sentence for the log per `auto` that fell back

    def applied(self, config: Config) -> Config:
        """The configuration to build networks from."""
        student = dataclasses.replace(config.student, attention_backend=self.attention_backend)
        return dataclasses.replace(config, student=student)


def resolve_performance(
    config: Config, device: torch.device, checks: Mapping[str, Check] = CHECKS
) -> ResolvedPerformance:
    """Decide every ``auto`` of a validated configuration, the same on all ranks, which must all call.

    On a GPU each switch that is on is checked, once per node: an ``auto`` (and attention that PyTorch chooses) falls
    back to the plain path, anything else is refused. On a CPU ``auto`` is off, and what is asked for is checked but
    for compilation, which takes long there.

    Raises ValueError if something cannot be used that is asked for; names all such.
    """
    on_gpu = device.type == "cuda"
    settings = {name: attrgetter(check.key)(config) for name, check in checks.items()}
    on = {name: setting not in (False, "none") and (on_gpu or setting != "auto") for name, setting in settings.items()}
    notes = []
    scales_losses = config.compute_precision.grad_scaler and any(_keys_of_dtype(config, "student", "fp16"))
    if on["fused_update"] and settings["fused_update"] == "auto" and scales_losses:
        on["fused_update"] = False
        notes.append("performance.fused_update = auto is off because fp16 needs loss scaling; bf16 does not.")
    faults, problems = [*_faults(config, device)], {}
    if not faults and get_local_rank() == 0:
        wanted = [name for name in checks if on[name] and (on_gpu or name != "compile")]
        tried = {name: checks[name].problem(config, device) for name in wanted}
        problems = {name: problem for name, problem in tried.items() if problem}
    # What one node cannot do none does; the lowest rank tells why.
    everywhere = reduce(lambda first, other: other | first, gather_objects(problems))
    for name, problem in everywhere.items():
        check, value = checks[name], str(settings[name]).lower()
        if value in ("auto", "sdpa"):
            on[name] = False
            notes.append(f"{check.key} = {value} takes the slower plain path, since {problem}.")
        else:
            faults.append(f"{check.key} = {value} cannot be used, since {problem}; {check.remedy}.")
    if faults:
        raise ValueError(" ".join(faults))
    attention = settings["attention"] if on["attention"] else "math"
    return ResolvedPerformance(on["compile"], on["fused_update"], attention, tuple(notes))


def _faults(config: Config, device: torch.device) -> Iterator[str]:
    if torch.torch_version.TorchVersion(torch.__version__.split("a")[0]) < _OLDEST_TORCH:
        yield f"PyTorch {torch.__version__} is too old: {_OLDEST_TORCH} or newer is needed."
    in_bf16 = [key for role in ("student", "teacher") for key in _keys_of_dtype(config, role, "bf16")]
    if in_bf16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_BF16:
        yield (
            f"{in_bf16[0]} = bf16, but {torch.cuda.get_device_name(device)} has no bf16 matmuls; set fp16 for every "
            "module and compute_precision.grad_scaler = true."
        )


def _keys_of_dtype(config: Config, role: str, dtype: str) -> Iterator[str]:
    """Configuration keys of modules that compute in ``dtype``."""
    for name, module in vars(getattr(config.compute_precision, role)).items():
        if module.mixed_precision.param_dtype == dtype:
            yield f"compute_precision.{role}.{name}.mixed_precision.param_dtype"
