"""GPUs are known by their exact model."""

import pytest

from dinov2.train.plan.hardware import ASSUMED_GPU, find_gpu


@pytest.mark.parametrize(
    ("device_name", "model"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA L40S", "L40S"),
        (ASSUMED_GPU, ASSUMED_GPU),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA L40", None),
        ("", None),
    ],
)
def test_models(device_name, model):
    found = find_gpu(device_name)
    assert (found and found.name) == model
