"""Switches fall back where they are ``auto`` and their check fails, and are refused where they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dinov2.configs import Config, load_config
from dinov2.train.performance import capabilities
from dinov2.train.performance.capabilities import ResolvedPerformance, resolve_performance
from dinov2.train.performance.preflight import CHECKS, Check, Results
from tests.helpers.runs import TINY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ONE = torch.ones(3)
Compare = Callable[[Config, torch.device], Results]


def config(*overrides: str, dtype: str = "bf16") -> Config:
    dtypes = [
        f"compute_precision.{network}.{module}.mixed_precision.param_dtype={dtype}"
        for network in ("student", "teacher")
        for module in ("backbone", "dino_head", "ibot_head")
    ]
    return load_config(None, [*TINY, *dtypes, *overrides])


def equal(_: Config, __: torch.device) -> Results:
    return [(ONE, ONE)]


def differing(_: Config, __: torch.device) -> Results:
    return [(ONE, ONE), (1.5 * ONE, ONE)]


def failing(_: Config, __: torch.device) -> Results:
    raise RuntimeError("no kernel image\nis available.")


def checks(**compare: Compare) -> dict[str, Check]:
    """Checks that pass on any machine, but for those given."""
    return {name: replace(check, compare=compare.get(name, equal)) for name, check in CHECKS.items()}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")


@pytest.mark.parametrize(
    ("device", "overrides", "dtype", "expected"),
    [
        (GPU, (), "bf16", (True, True)),
        (CPU, (), "bf16", (False, False)),
        (GPU, ("performance.compile=false", "performance.fused_update=false"), "bf16", (False, False)),
        (CPU, ("performance.compile=true",), "bf16", (True, False)),
        (CPU, ("performance.fused_update=true",), "bf16", (False, True)),
    ],
)
def test_auto(device, overrides, dtype, expected):
    resolved = resolve_performance(config(*overrides, dtype=dtype), device, checks())
    assert (resolved.compile, resolved.fused_update) == expected
    assert resolved.notes == ()


def test_loss_scaling_keeps_the_plain_update():
    resolved = resolve_performance(config(dtype="fp16"), GPU, checks())
    assert (resolved.compile, resolved.fused_update) == (True, False)
    (note,) = resolved.notes
    assert "loss scaling" in note


@pytest.mark.parametrize(("kernel", "words"), [(failing, "no kernel image"), (differing, "by 0.5 of")])
@pytest.mark.parametrize(
    ("switch", "key", "expected"),
    [
        ("compile", "performance.compile", ResolvedPerformance(False, True)),
        ("fused_update", "performance.fused_update", ResolvedPerformance(True, False)),
        ("attention", "student.attention_backend", ResolvedPerformance(True, True, "math")),
    ],
)
def test_an_automatic_switch_falls_back_with_one_warning(kernel, words, switch, key, expected):
    resolved = resolve_performance(config(), GPU, checks(**{switch: kernel}))
    assert replace(resolved, notes=()) == expected
    (note,) = resolved.notes
    assert key in note and words in note and "\n" not in note


@pytest.mark.parametrize("kernel", [failing, differing])
@pytest.mark.parametrize(
    ("switch", "setting"),
    [
        ("compile", "performance.compile=true"),
        ("fused_update", "performance.fused_update=true"),
        ("attention", "student.attention_backend=cudnn"),
        ("fp8", "performance.fp8=teacher"),
    ],
)
def test_what_was_asked_for_is_refused(kernel, switch, setting):
    with pytest.raises(ValueError, match=setting.replace("=", " = ")) as raised:
        resolve_performance(config(setting), GPU, checks(**{switch: kernel}))
    assert str(raised.value).count("cannot be used") == 1


def test_all_faults_come_together():
    with pytest.raises(ValueError, match=r"performance\.compile.*performance\.fp8"):
        resolve_performance(
            config("performance.compile=true", "performance.fp8=all"),
            GPU,
            checks(compile=failing, fp8=differing),
        )


def test_what_is_off_is_not_checked():
    everything = checks(compile=failing, fused_update=failing, fp8=failing)
    resolve_performance(config("performance.compile=false", "performance.fused_update=false"), GPU, everything)
    resolve_performance(config(), CPU, everything)


def test_one_process_of_a_node_checks_and_all_decide_alike(monkeypatch: pytest.MonkeyPatch):
    elsewhere = {"compile": "it fails (on node 1)"}
    monkeypatch.setattr(capabilities, "gather_objects", lambda own: [own, elsewhere, {}])
    resolved = resolve_performance(config(), GPU, checks())
    assert not resolved.compile and resolved.fused_update
    monkeypatch.setattr(capabilities, "get_local_rank", lambda: 3)
    failing_everywhere = checks(**dict.fromkeys(CHECKS, failing))
    assert resolve_performance(config(), GPU, failing_everywhere) == resolved


def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    with pytest.raises(ValueError, match=r"bf16, but NVIDIA H200.*fp16.*grad_scaler"):
        resolve_performance(config(), GPU, checks())
    resolve_performance(config(dtype="fp16"), GPU, checks())


@pytest.mark.parametrize(("version", "old"), [("2.10.1+cu128", True), ("2.11.0a0+git123", False)])
def test_an_old_torch(monkeypatch: pytest.MonkeyPatch, version: str, old: bool):
    monkeypatch.setattr(torch, "__version__", version)
    if old:
        with pytest.raises(ValueError, match=r"2\.10\.1\+cu128 is too old: 2\.11"):
            resolve_performance(config(), CPU, checks())
    else:
        resolve_performance(config(), CPU, checks())


def test_networks_are_built_for_the_kernel_that_was_decided():
    asked = config()
    built = ResolvedPerformance(False, False, "math").applied(asked)
    assert built.student.attention_backend == "math"
    assert replace(built, student=asked.student) == asked
