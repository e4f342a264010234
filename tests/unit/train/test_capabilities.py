"""What a machine lacks is said in one sentence each, and ``auto`` falls back."""

from __future__ import annotations

import pytest
import torch

from dinov2.configs import Config, load_config
from dinov2.train.performance.capabilities import Machine, capability_faults, resolve_performance
from tests.helpers.runs import TINY

HOPPER = Machine("2.15.0+cu132", "cuda", (9, 0), "NVIDIA H200", triton=True)
VOLTA = Machine("2.11.0", "cuda", (7, 0), "Tesla V100-SXM2-16GB", triton=True)
NO_TRITON = Machine("2.11.0", "cuda", (9, 0), "NVIDIA H100", triton=False)
CPU = Machine("2.15.0+cpu", "cpu")


def config(*overrides: str, dtype: str = "bf16") -> Config:
    dtypes = [
        f"compute_precision.{network}.{module}.mixed_precision.param_dtype={dtype}"
        for network in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
    ]
    return load_config(None, [*TINY, *dtypes, *overrides])


def only_fault(machine: Machine, *overrides: str, **kwargs: str) -> str:
    (fault,) = capability_faults(config(*overrides, **kwargs), machine)
    return fault


@pytest.mark.parametrize("machine", [HOPPER, CPU])
def test_the_defaults_run_on_a_current_gpu_and_on_a_cpu(machine):
    assert capability_faults(config(), machine) == []


def test_a_gpu_without_bf16():
    fault = only_fault(VOLTA)
    assert "bf16, but Tesla V100-SXM2-16GB (compute capability 7.0)" in fault
    assert "fp16" in fault and "grad_scaler" in fault
    assert capability_faults(config(dtype="fp16"), VOLTA) == []


def test_an_old_torch():
    assert "2.10.1+cu128 is too old: 2.11" in only_fault(Machine("2.10.1+cu128", "cuda", (9, 0), triton=True))
    assert capability_faults(config(), Machine("2.11.0a0+git123", "cuda", (9, 0), triton=True)) == []


def test_fp8_that_cannot_be_had():
    machine = Machine("2.15.0", "cuda", (8, 0), "A100", triton=True, fp8_problem="A100 is too old for FP8.")
    fault = only_fault(machine, "performance.fp8=teacher")
    assert fault == (
        "performance.fp8 = teacher cannot be had: A100 is too old for FP8; performance.fp8 = none computes in 16 bit."
    )
    assert capability_faults(config(), machine) == []


@pytest.mark.parametrize("backend", ["efficient", "cudnn", "xformers"])
def test_attention_backends_without_a_gpu(backend):
    assert "needs a CUDA device" in only_fault(CPU, f"student.attention_backend={backend}")
    assert capability_faults(config(f"student.attention_backend={backend}"), HOPPER) == []


def test_attention_backends_of_16_bit():
    fault = only_fault(HOPPER, "student.attention_backend=flash", dtype="fp32")
    assert "student.backbone.mixed_precision.param_dtype = fp32" in fault
    assert "Tesla V100" in only_fault(VOLTA, "student.attention_backend=cudnn", dtype="fp16")


def test_triton_missing_where_it_was_asked_for():
    assert "not installed" in only_fault(NO_TRITON, "performance.compile=true")
    assert "not installed" in only_fault(NO_TRITON, "performance.fused_update=true")
    assert "needs a GPU" in only_fault(CPU, "performance.fused_update=true")
    assert capability_faults(config("performance.compile=true"), CPU) == []
    without_kernels = config("performance.compile=true", "debug.compile_backend=aot_eager")
    assert capability_faults(without_kernels, NO_TRITON) == []


@pytest.mark.parametrize(
    ("machine", "overrides", "dtype", "expected", "words"),
    [
        (HOPPER, (), "bf16", (True, True), []),
        (CPU, (), "bf16", (False, False), []),
        (HOPPER, (), "fp16", (True, False), ["loss scaling"]),
        (NO_TRITON, (), "bf16", (False, False), ["Triton", "Triton"]),
        (NO_TRITON, ("debug.compile_backend=eager",), "bf16", (True, False), ["Triton"]),
        (HOPPER, ("performance.compile=false", "performance.fused_update=false"), "bf16", (False, False), []),
        (CPU, ("performance.compile=true",), "bf16", (True, False), []),
    ],
)
def test_auto(machine, overrides, dtype, expected, words):
    resolved = resolve_performance(config(*overrides, dtype=dtype), machine)
    assert (resolved.compile, resolved.fused_update) == expected
    assert len(resolved.notes) == len(words)
    assert all(word in note for word, note in zip(words, resolved.notes, strict=True))


def test_resolving_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"bf16 products.*CUDA|bf16 products"):
        resolve_performance(config(), VOLTA)


def test_this_machine():
    machine = Machine.of(torch.device("cpu"), "none")
    assert (machine.torch, machine.device, machine.capability) == (torch.__version__, "cpu", None)
    assert machine.fp8_problem == "none"


@pytest.mark.parametrize(("compiler", "able"), [("", False), ("/usr/bin/some-cc", True)])
def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, compiler: str, able: bool):
    """It compiles the launcher of every kernel, where it first runs."""
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    machine = Machine.of(torch.device("cuda"))
    assert machine.triton == able
    if not able:
        assert "which finds no C compiler" in only_fault(machine, "performance.compile=true")
        assert "finds no C compiler" in resolve_performance(config(), machine).notes[0]
