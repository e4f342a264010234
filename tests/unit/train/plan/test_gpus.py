"""GPUs by what their drivers, and users, call them, against the figures of the data sheets."""

from __future__ import annotations

import pytest

from dinov2.train.plan.gpus import GPUS, assumed_gpu, find_gpu, named_gpu, seen_gpu

GIB = 2**30


@pytest.mark.parametrize(
    ("device_name", "sold_gb", "sparse_tflops"),
    [
        ("NVIDIA B200", 180, 36000 / 8),
        ("NVIDIA GB200", 186, 10000 / 2),
        ("NVIDIA H200", 141, 1979),
        ("NVIDIA H200 NVL", 141, 1671),
        ("NVIDIA H100 80GB HBM3", 80, 1979),
        ("NVIDIA H100 NVL", 94, 1671),
        ("NVIDIA H100 PCIe", 80, 1513),
        ("NVIDIA GH200 480GB", 96, 1979),
        ("NVIDIA GH200 144G HBM3e", 144, 1979),
        ("NVIDIA A100-SXM4-80GB", 80, 624),
        ("NVIDIA A100 80GB PCIe", 80, 624),
        ("NVIDIA A100-SXM4-40GB", 40, 624),
        ("NVIDIA A100-PCIE-40GB", 40, 624),
        ("NVIDIA A40", 48, 299.4),
        ("NVIDIA A10", 24, 250),
        ("NVIDIA A10G", 24, 140),
        ("NVIDIA RTX A6000", 48, 309.7),
        ("NVIDIA L40S", 48, 733),
        ("NVIDIA L40", 48, 362.1),
        ("NVIDIA L4", 24, 242),
        ("NVIDIA GeForce RTX 5090", 32, 419),
        ("NVIDIA GeForce RTX 4090", 24, 330.3),
        ("NVIDIA GeForce RTX 3090", 24, 142),
    ],
)
def test_the_data_sheets(device_name: str, sold_gb: float, sparse_tflops: float):
    """Peaks are half of those with sparsity; what PyTorch sees is 86 to 107 % of the gigabytes sold."""
    gpu = find_gpu(device_name)
    assert 2 * gpu.bf16 == pytest.approx(sparse_tflops * 1e12, rel=0.015)
    assert 0.86 < gpu.memory / (sold_gb * 1e9) < 1.07
    assert 0 < gpu.fp32 < gpu.bf16


def test_each_model_stands_once():
    names = [driver for gpu in GPUS for driver in gpu.drivers]
    assert len(names) == len(set(names)) and [find_gpu(name).name for name in names if find_gpu(name)]
    assert all(named_gpu(gpu.name) == gpu for gpu in GPUS)


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA H200 MIG 1g.18gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU",
     "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H20", "NVIDIA L20", "NVIDIA GH200", "Tesla T4",
     "NVIDIA GeForce GTX 1080", "AMD Instinct MI300X", ""],
)  # fmt: skip
def test_other_models_are_unknown(device_name: str):
    assert find_gpu(device_name) is None
    gpu = seen_gpu(device_name, 18 * GIB)
    assert (gpu.memory, gpu.is_known) == (18 * GIB, False)


def test_memory_is_what_torch_sees():
    total = 150_754_820_096  # of an H200
    gpu = seen_gpu("NVIDIA H200", total)
    assert gpu.memory == total and gpu.bf16 == find_gpu("NVIDIA H200").bf16
    # A driver that gives a whole model's name to a part of it.
    assert not seen_gpu("NVIDIA H200", total // 2).is_known


@pytest.mark.parametrize(
    ("name", "gib", "driver"),
    [
        ("h200", None, "H200"),
        ("NVIDIA H200", None, "H200"),
        ("H200 nvl", None, "H200 NVL"),
        ("H100 SXM5", None, "H100 80GB HBM3"),
        ("h100-pcie", None, "H100 PCIe"),
        ("H100", 94, "H100 NVL"),
        ("GH200", 96, "GH200 480GB"),
        ("GH200", 144, "GH200 144G HBM3e"),
        ("gh200 144gb", None, "GH200 144G HBM3e"),
        ("A100-80", None, "A100-SXM4-80GB"),  # both of that size plan alike
        ("A100 40 GB", None, "A100-SXM4-40GB"),
        ("A100", 40, "A100-SXM4-40GB"),
        ("a10", None, "A10"),
        ("l4", None, "L4"),
        ("L40", None, "L40"),
        ("4090", None, "RTX 4090"),
        ("rtx4090", None, "RTX 4090"),
        ("RTX 3090", 24, "RTX 3090"),
        ("GeForce RTX 5090", None, "RTX 5090"),
        ("B200", None, "B200"),
    ],
)
def test_names_of_users(name: str, gib: float | None, driver: str):
    assert named_gpu(name, gib) == find_gpu(driver)


def test_less_memory_than_the_model_has():
    gpu = named_gpu("H200", 100)
    assert (gpu.memory, gpu.bf16) == (100 * GIB, find_gpu("H200").bf16)


@pytest.mark.parametrize(("name", "gib"), [("V100", 32), ("", 24), ("RTX 3090 Ti", 24), ("GH200 97GB", 97)])
def test_an_unknown_gpu_of_known_memory(name: str, gib: float):
    gpu = named_gpu(name, gib)
    assert (gpu.memory, gpu.is_known) == (gib * GIB, False)


@pytest.mark.parametrize(
    ("name", "gib", "said"),
    [
        ("V100", None, "--memory"),
        ("", None, "--memory"),
        ("H100", None, "H100 NVL 94GB"),
        ("H100", 80, "H100 PCIe 80GB"),
        ("GH200", None, "GH200 144GB"),
        ("A100", None, "A100 SXM 40GB"),
        ("24GB", None, "L4 24GB"),
        ("RTX 4090", 139, "RTX 4090 24GB"),
        ("H200", float("inf"), "--memory"),
    ],
)
def test_names_that_are_refused_say_what_is_accepted(name: str, gib: float | None, said: str):
    with pytest.raises(ValueError) as raised:
        named_gpu(name, gib)
    assert said in str(raised.value)


def test_the_assumed_gpu_is_not_mistaken_for_a_seen_one():
    gpu = assumed_gpu()
    assert gpu.bf16 == find_gpu("H200").bf16 and gpu.name not in {known.name for known in GPUS}
