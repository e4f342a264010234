"""GPUs that a plan can be made for, by exact model: peak rates and memory. Imports no torch."""

import dataclasses
import math
import re
from dataclasses import dataclass

_GIB = 2**30
_NEAR = 0.1  # fraction by which a memory may differ from the table's and still be that model's
_MOST_GIB = 4096


@dataclass(frozen=True)
class Gpu:
    """One GPU; peaks are without sparsity, 0 where none is known."""

    name: str
    drivers: tuple[str, ...]  # as the driver names it, but for the maker's words
    memory: int  # bytes that PyTorch can see, less than what is sold
    bf16: float = 0.0  # floating-point operations per second of matmuls in 16 bit, sums in float32
    fp32: float = 0.0  # the same in float32, TF32 off

    @property
    def is_known(self) -> bool:
        """Whether its peaks are known."""
        return self.bf16 > 0


# Peaks are NVIDIA's own; where a data sheet gives them with sparsity (*) they are halved. Memory is what PyTorch
# reports as the device's total, in whole GiB.
#   B200, GB200      HGX B200 and GB200 NVL72 data sheets: 36* PFLOPS of 8 GPUs, 10* of the two of a superchip
#   H200             H200 data sheet: 1,979* SXM, 1,671* NVL
#   H100             H100 data sheet: 1,979* SXM, 1,671* NVL, 1,513* PCIe
#   GH200            GH200 data sheet: 990, either memory; the 120 or 480 GB of the driver's name are the processor's
#   A100, A40, A10   their data sheets: 312, 149.7, 125
#   A10G             data sheet of the AWS model: 70
#   RTX A6000        data sheet: 309.7*
#   L40S, L40, L4    their data sheets: 362, 181, 242*
#   RTX 5090         RTX Blackwell white paper, bf16 with float32 sums: 209.5
#   RTX 4090         Ada white paper, the same: 165.2
#   RTX 3090         GA102 white paper, the same: 71
GPUS = tuple(
    Gpu(name, drivers, memory * _GIB, bf16 * 1e12, fp32 * 1e12)
    for name, drivers, memory, bf16, fp32 in (
        ("B200 SXM 180GB", ("B200",), 178, 2250, 75),
        ("GB200 186GB", ("GB200",), 184, 2500, 80),
        ("H200 SXM 141GB", ("H200",), 139, 989.4, 67),
        ("H200 NVL 141GB", ("H200 NVL",), 139, 835.5, 60),
        ("H100 SXM 80GB", ("H100 80GB HBM3",), 79, 989.4, 67),
        ("H100 NVL 94GB", ("H100 NVL",), 93, 835.5, 60),
        ("H100 PCIe 80GB", ("H100 PCIe",), 79, 756.5, 51),
        ("GH200 96GB", ("GH200 480GB", "GH200 120GB"), 94, 989.4, 67),
        ("GH200 144GB", ("GH200 144G HBM3e",), 142, 989.4, 67),
        ("A100 SXM 80GB", ("A100-SXM4-80GB",), 79, 312, 19.5),
        ("A100 PCIe 80GB", ("A100 80GB PCIe",), 79, 312, 19.5),
        ("A100 SXM 40GB", ("A100-SXM4-40GB",), 39, 312, 19.5),
        ("A100 PCIe 40GB", ("A100-PCIE-40GB",), 39, 312, 19.5),
        ("A40 48GB", ("A40",), 44, 149.7, 37.4),
        ("A10 24GB", ("A10",), 22, 125, 31.2),
        ("A10G 24GB", ("A10G",), 22, 70, 35),
        ("RTX A6000 48GB", ("RTX A6000",), 47, 154.8, 38.7),
        ("L40S 48GB", ("L40S",), 44, 362, 91.6),
        ("L40 48GB", ("L40",), 44, 181, 90.5),
        ("L4 24GB", ("L4",), 22, 121, 30.3),
        ("RTX 5090 32GB", ("RTX 5090",), 31, 209.5, 104.8),
        ("RTX 4090 24GB", ("RTX 4090",), 23, 165.2, 82.6),
        ("RTX 3090 24GB", ("RTX 3090",), 23, 71, 35.6),
    )
)

ASSUMED_GPU = "NVIDIA H200"
"""Driver's name of the device of a plan where there is no GPU and none is named."""


def find_gpu(device_name: str, memory: int | None = None) -> Gpu | None:
    """The table's entry for a driver's name such as "NVIDIA H100 80GB HBM3", every word of which has to be there.

    None for another model, part of a GPU (MIG), or a ``memory`` in bytes that is not that model's.
    """
    words = _words(device_name)
    gpu = next((gpu for gpu in GPUS if any(words == _words(driver) for driver in gpu.drivers)), None)
    return gpu if gpu and (memory is None or _is_near(memory, gpu)) else None


def seen_gpu(device_name: str, memory: int) -> Gpu:
    """A GPU by its driver's name and the bytes that PyTorch sees; without peaks where it is unknown."""
    gpu = find_gpu(device_name, memory)
    return dataclasses.replace(gpu, memory=memory) if gpu else Gpu(device_name, (), memory)


def assumed_gpu() -> Gpu:
    """The device of a plan where there is none, and its name says so."""
    gpu = find_gpu(ASSUMED_GPU)
    return dataclasses.replace(gpu, name=f"an assumed {gpu.name}")


def named_gpu(name: str, gib: float | None = None) -> Gpu:
    """The GPU that a user names by some words of the table's or the driver's name, such as "h100 nvl" or "4090".

    Args:
        name: empty for a GPU of which nothing but the memory is known.
        gib: memory in GiB. It tells models of one name apart, is the memory of an unknown GPU, and may be less than a
            known one has, for what other programs take.

    Raises:
        ValueError: if the name fits no model and there is no memory, or it fits several that differ, or none has as
            much memory.
    """
    if gib is not None and not gib <= _MOST_GIB:
        raise ValueError(f"--memory = {gib:g} GiB is more than any GPU has; give at most {_MOST_GIB}.")
    memory = None if gib is None else round(gib * _GIB)
    words, gpu = _words(name), find_gpu(name)
    found = [gpu] if gpu else [gpu for gpu in GPUS if words and words <= _words(" ".join((gpu.name, *gpu.drivers)))]
    if memory and len(found) > 1:
        found = [gpu for gpu in found if _is_near(memory, gpu)] or found
    if not found:
        if memory is None:
            raise ValueError(
                f"--gpu = {name!r} is not known here; give --memory, its GiB, for a plan without hours, or one of "
                f"{_names(GPUS)}."
            )
        return Gpu(name or f"a GPU of {gib:g} GiB", (), memory)
    if len({(gpu.memory, gpu.bf16, gpu.fp32) for gpu in found}) > 1:
        raise ValueError(f"--gpu = {name!r} may be {_names(found)}; name one of them.")
    gpu = found[0]
    if memory and memory > (1 + _NEAR) * gpu.memory:
        raise ValueError(
            f"--memory = {gib:g} GiB is more than the {gpu.memory / _GIB:.0f} that PyTorch sees on {gpu.name}; leave "
            "it out, or name another GPU."
        )
    return dataclasses.replace(gpu, memory=min(memory or gpu.memory, gpu.memory))


def _names(gpus: tuple[Gpu, ...] | list[Gpu]) -> str:
    return ", ".join(gpu.name for gpu in gpus)


def _is_near(memory: int, gpu: Gpu) -> bool:
    return math.isclose(memory, gpu.memory, rel_tol=_NEAR)


def _words(name: str) -> set[str]:
    """Words of a name without the maker's, in one spelling: "RTX4090" is two, "80GB" is 80, "SXM4" is sxm."""
    split = re.sub(r"\brtx(?=\d)", "rtx ", name.lower())
    words = {re.sub(r"^(\d+)gb?$", r"\1", word) for word in re.findall(r"[a-z0-9]+", split)}
    return {re.sub(r"^sxm\d$", "sxm", word) for word in words} - {"nvidia", "geforce", "tesla", "gb"}
