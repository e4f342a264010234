"""Peak rates of GPUs and links by their data sheets, and the rent of one."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU, without sparsity.

    Attributes:
        name: a word of the driver's name of the device.
        memory: bytes that PyTorch can see.
        bf16: floating-point operations per second of matmuls in 16 bit.
        fp32: the same in float32, TF32 off.
        bandwidth: of the memory, bytes per second.
        link: to the other GPUs of its node, bytes per second and direction.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float


GPUS = (
    Gpu("B200", 178 * _GIB, 2250e12, 75e12, 7.7e12, 900e9),
    Gpu("H200", 139 * _GIB, 989.4e12, 67e12, 4.8e12, 450e9),
    Gpu("H100", 79 * _GIB, 989.4e12, 67e12, 3.35e12, 450e9),
    Gpu("A100-SXM4-80GB", 79 * _GIB, 312e12, 19.5e12, 2.04e12, 300e9),
    Gpu("A100-SXM4-40GB", 39 * _GIB, 312e12, 19.5e12, 1.56e12, 300e9),
    Gpu("L40S", 44 * _GIB, 362e12, 91.6e12, 0.86e12, 32e9),
)
"""SXM modules where there are several kinds; the PCIe and NVL kinds of the same name are slower and not listed."""

ASSUMED_GPU = "H200"
"""What a plan is made for where there is no GPU, or one that is not in the table."""

ASSUMED_PEAK_FRACTION = 0.5
"""Fraction of the peak that the step's model FLOPs are assumed to reach; the published code reached 0.24."""

NETWORK_LINK = 50e9
"""Bytes per second, direction and GPU between nodes: one 400 Gb/s InfiniBand port per GPU."""

DOLLARS_PER_GPU_HOUR = 2.5
"""Rent of one H100 as the published run counted it in November 2025 (667 GPU-hours for 1,667 dollars)."""


def find_gpu(device_name: str) -> Gpu | None:
    """The table's entry for a driver's device name such as "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = device_name.split()
    if {"PCIe", "NVL", "MIG"} & set(words):
        return None
    return next((gpu for gpu in GPUS if gpu.name in words), None)
