"""The Triton update equals the reference. On a CPU the kernel runs in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.train.update.fused_update import BLOCK, WARPS, FusedWeightUpdate, why_not_fused
from dinov2.train.update.weight_update import WeightUpdate
from tests.helpers.weight_updates import (
    Step,
    assert_near,
    formula,
    networks,
    optimizer_of,
    run,
    set_rates,
    steps,
)

pytest.importorskip("triton")
SAME = 1e-6  # relative to a tensor's largest element
Call = Callable[..., Any]


class ManyChunks(FusedWeightUpdate):
    """So small that the largest tensor takes three programs."""

    chunk = 1024


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernel is defined
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """Calls a function of this module in a process that interprets kernels."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=120)


def skipping(*bad: int) -> list[Step]:
    return [dataclasses.replace(step, all_finite=float(i not in bad)) for i, step in enumerate(steps())]


def compare(script: list[Step], max_norm: float) -> None:
    found = run(ManyChunks, script, max_norm)
    assert_near(found, run(WeightUpdate, script, max_norm), SAME)
    assert_near(found, formula(script, max_norm), SAME)


@pytest.mark.parametrize("max_norm", [3.0, 0.0])
def test_equals_the_reference(interpreted: Call, max_norm: float):
    interpreted(compare, steps(), max_norm)


@pytest.mark.parametrize("bad", [(0,), (2, 4)])
def test_a_bad_step_changes_nothing(interpreted: Call, bad: tuple[int, ...]):
    interpreted(compare, skipping(*bad), 3.0)


def compare_small_gradients() -> None:
    """Near eps, where a factor of the gradient no longer cancels; and zero, where 0 / 0 threatens."""
    for scale in (1e-8, 0.0):
        script = steps(3, scale)
        assert_near(run(ManyChunks, script), run(WeightUpdate, script), SAME)


def test_small_gradients(interpreted: Call):
    interpreted(compare_small_gradients)


def compare_momentum() -> None:
    for momentum in (0.0, 0.3, 1.0):
        script = [dataclasses.replace(step, momentum=momentum) for step in steps(1)]
        assert_near(run(ManyChunks, script), run(WeightUpdate, script), SAME)


def test_moving_average_at_both_ends(interpreted: Call):
    interpreted(compare_momentum)


def sixteen_bit(student: nn.ModuleDict, teacher: nn.ModuleDict) -> list[tuple[Tensor, Tensor]]:
    """Of all weights, in both dtypes, so that some are written by the kernel and some after it; one transposed."""
    weights = [*student.parameters(), *teacher.parameters()]
    pairs = [(w, torch.zeros_like(w, dtype=d)) for i, w in enumerate(weights) for d in _in_turn(i)]
    grid = teacher["backbone"].grid
    return [*pairs, (grid, torch.zeros(7, 5, 3, dtype=torch.bfloat16).permute(2, 1, 0))]


def _in_turn(i: int) -> list[torch.dtype]:
    both = [torch.bfloat16, torch.float16]
    return both if i % 3 == 0 else [both[i % 2]]


def compare_copies() -> None:
    script = steps(3)
    found = run(ManyChunks, script, low_precision=sixteen_bit)
    for i, (name, copy) in enumerate(_copied(found)):
        assert torch.equal(copy, found[name].to(copy.dtype)), (i, name)


def _copied(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    student, teacher = networks()
    names = [f"student.{n}" for n, _ in student.named_parameters()]
    names += [f"teacher.{n}" for n, _ in teacher.named_parameters()]
    names = [name for i, name in enumerate(names) for _ in _in_turn(i)] + ["teacher.backbone.grid"]
    for i, name in enumerate(names):
        yield name, found[f"copy.{i}"]


def test_copies_are_bit_equal_to_rounded_weights(interpreted: Call):
    interpreted(compare_copies)


def rounding_of_every_kind_of_number() -> None:
    """Ties, subnormals, overflow, infinities and NaN, as teacher's weights that the update leaves as they are."""
    values = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x00018000, 0x7F7FFFFF, 0x477FF000, 0x477FEFFF])
    values = torch.cat([values.int().view(torch.float32), torch.tensor([float("inf"), float("nan"), -0.0])])
    values = torch.cat([values, -values])
    for dtype in (torch.bfloat16, torch.float16):
        net = nn.ModuleDict({"backbone": nn.ParameterList([nn.Parameter(values.clone())])})
        twin = nn.ModuleDict({"backbone": nn.ParameterList([nn.Parameter(values.clone())])})
        copy = torch.zeros_like(values, dtype=dtype)
        pairs = [(net["backbone"][0], copy)]
        update = ManyChunks(torch.optim.AdamW(net.parameters(), fused=True), net, twin, 0.0, pairs)
        update.apply(0.5, torch.ones(()))
        expected = values.to(dtype)
        number = ~values.isnan()
        assert torch.equal(copy.view(torch.int16)[number], expected.view(torch.int16)[number]), dtype
        assert copy[~number].isnan().all()


def test_rounding(interpreted: Call):
    interpreted(rounding_of_every_kind_of_number)


def transposed(_: nn.Parameter, gradient: Tensor) -> Tensor:
    return gradient.mT.contiguous().mT if gradient.ndim > 1 else gradient


def in_bfloat16(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    parameter.grad_dtype = torch.bfloat16
    return gradient.bfloat16()


def compare_gradient_layouts() -> None:
    script = steps(3)
    assert_near(run(ManyChunks, script, adapt=transposed), run(WeightUpdate, script), SAME)
    expected = run(WeightUpdate, script, 0.0, adapt=lambda _, gradient: gradient.bfloat16().float())
    found = run(ManyChunks, script, 0.0, adapt=in_bfloat16)
    keys = [key for key in expected if not key.startswith("norm")]  # of bfloat16 gradients in bfloat16
    assert_near({key: found[key] for key in keys}, {key: expected[key] for key in keys}, SAME)


def test_gradients_that_are_transposed_or_16_bit(interpreted: Call):
    interpreted(compare_gradient_layouts)


def beyond_two_to_the_31() -> None:
    """The last five elements of a tensor of 2^32 and more, of which only these exist: its address is set back."""
    from dinov2.train.update.kernel import COLUMNS, FLAGS, RATES, SIZE, weight_update_kernel

    start, count = 2**32, 5
    student, teacher = torch.arange(5.0), torch.zeros(5)
    row = [0] * COLUMNS.value
    row[0], row[1] = (tensor.data_ptr() - 4 * start for tensor in (student, teacher))
    row[SIZE.value], row[FLAGS.value] = start + count, 0
    weight_update_kernel[(1,)](
        torch.tensor([row]),
        torch.zeros(1, RATES.value, dtype=torch.float64),
        torch.tensor([[0, start]]),
        torch.ones(1),
        torch.ones(()),
        0.25,
        CHUNK=1024,
        BLOCK=512,
    )
    assert torch.equal(teacher, 0.25 * torch.arange(5.0))


def test_tensors_of_more_than_two_to_the_31_elements(interpreted: Call):
    interpreted(beyond_two_to_the_31)


class NoReadback(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            raise AssertionError(str(function))
        return function(*args, **(kwargs or {}))


def update_without_readback(kind: type[WeightUpdate]) -> None:
    student, teacher = networks()
    optimizer = optimizer_of(student)
    (step,) = steps(1)
    set_rates(optimizer, student, step)
    for name, parameter in student.named_parameters():
        parameter.grad = step.gradients[name]
    update = kind(optimizer, student, teacher, 3.0, sixteen_bit(student, teacher))
    if isinstance(update, FusedWeightUpdate):  # without the kernel, whose interpreter itself reads tensors
        stub = defaultdict(lambda: lambda *_, **__: None)
        update._kernel = SimpleNamespace(**{**vars(update._kernel), "weight_update_kernel": stub})
    all_finite = torch.ones(())
    with NoReadback():
        update.grad_norms()
        update.apply(0.9, all_finite)


@pytest.mark.parametrize("kind", [WeightUpdate, FusedWeightUpdate])
def test_the_host_waits_for_nothing(interpreted: Call, kind: type[WeightUpdate]):
    interpreted(update_without_readback, kind)


def updates_count_as_in_place() -> None:
    student, teacher = networks()
    weight = student["backbone"].weight
    product = (weight * weight).sum()
    ManyChunks(optimizer_of(student), student, teacher, 3.0).apply(0.5, torch.ones(()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_autograd_sees_that_weights_changed(interpreted: Call):
    interpreted(updates_count_as_in_place)


def reasons() -> dict[str, str | None]:
    student, teacher = networks()
    other = networks()[0]
    scaler = torch.amp.GradScaler("cpu")
    found = {"none": why_not_fused(optimizer_of(student), student, teacher)}
    found["scaler"] = why_not_fused(optimizer_of(student), student, teacher, scaler)
    found["amsgrad"] = why_not_fused(optimizer_of(student, amsgrad=True), student, teacher)
    found["dtype"] = why_not_fused(optimizer_of(student), student, networks()[1].bfloat16())
    other["dino_head"].mlp.data = torch.randn(8, 129).mT
    found["layout"] = why_not_fused(optimizer_of(other), other, teacher)
    return found


def test_why_not(interpreted: Call):
    found = interpreted(reasons)
    assert found["none"] is None
    assert "loss scaler" in found["scaler"]
    assert "amsgrad" in found["amsgrad"]
    assert "backbone.weight is torch.bfloat16" in found["dtype"]
    assert "dino_head.mlp is not" in found["layout"]


def test_a_cpu_without_the_interpreter_is_refused():
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"needs a CUDA device, and backbone\.weight is on cpu"):
        FusedWeightUpdate(optimizer_of(student), student, teacher, 3.0)


def test_triton_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "dinov2.train.update.kernel", None)
    student, teacher = networks()
    assert "Triton, which is not installed" in why_not_fused(optimizer_of(student), student, teacher)


def test_it_compiles_for_a_gpu_to_vector_accesses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The branch of aligned tensors: four elements at once, 5 tensors read and 4 written, and their 16-bit copies."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dinov2.train.update.kernel import weight_update_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"table": "*i64", "rates": "*fp64", "chunks": "*i64", "clip": "*fp32", "all_finite": "*fp32"}
    signature |= {"ema_weight": "fp32", "CHUNK": "constexpr", "BLOCK": "constexpr"}
    constants = {"CHUNK": FusedWeightUpdate.chunk, "BLOCK": BLOCK}
    source = ASTSource(weight_update_kernel, signature, constants)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    assembly = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    widths = Counter(re.findall(r"(?:ld|st)\.global\.v\w+", assembly))
    assert widths == {"ld.global.v4": 5, "st.global.v4": 4, "st.global.v2": 4}
    assert ".local" not in assembly  # no register is spilled


@pytest.mark.gpu
def test_on_a_gpu_it_equals_the_reference():
    """A few roundings apart: the compiler fuses multiplications with additions."""
    for kind in (ManyChunks, FusedWeightUpdate):
        script = skipping(3)
        found = run(kind, script, device="cuda", low_precision=sixteen_bit)
        expected = run(WeightUpdate, script, device="cuda", low_precision=sixteen_bit)
        weights = [name for name in expected if not name.startswith("copy")]
        assert_near({n: found[n] for n in weights}, {n: expected[n] for n in weights}, 2e-6)
        for name, copy in _copied(found):
            assert torch.equal(copy, found[name].to(copy.dtype)), name


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_nothing():
    student, teacher = (network.cuda() for network in networks())
    optimizer = optimizer_of(student)
    update = FusedWeightUpdate(optimizer, student, teacher, 3.0)
    all_finite = torch.ones((), device="cuda")
    for step in steps(3):
        set_rates(optimizer, student, step)
        for name, parameter in student.named_parameters():
            gradient = step.gradients[name]
            parameter.grad = None if gradient is None else gradient.cuda()
        torch.cuda.set_sync_debug_mode("error" if step.lr > 1e-2 else "default")  # the first step compiles
        try:
            update.grad_norms()
            update.apply(step.momentum, all_finite)
        finally:
            torch.cuda.set_sync_debug_mode("default")
