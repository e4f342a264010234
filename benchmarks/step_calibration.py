"""What the device can do with exactly the shapes of a step, and the time no step of these shapes can beat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.step_batches import Preset
from benchmarks.step_phases import Instants, wait
from dinov2.configs import Config
from dinov2.train.plan.measure import StepCosts
from dinov2.train.ssl_meta_arch import SSLMetaArch

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Of one update in one pass: weight, gradient and two moments read and all but the gradient written, the teacher's
# weight read and written, two 16-bit copies written.
UPDATE_BYTES = 4 * 4 + 3 * 4 + 2 * 4 + 2 * 2
DTYPE = torch.bfloat16


def calibrate(preset: Preset, device: torch.device) -> dict[str, Any]:
    """Bandwidth, rate of a large product, every shape of the blocks, and the floor that follows from them."""
    config = preset.config()
    student = SSLMetaArch(config, weights_device="meta").student
    measure = Stopwatch(device, preset.sample_ms)
    copy_ms = _copy_ms(preset.copy_bytes, measure)
    side = preset.large_product
    left, right = (_random(side, side, device=device) for _ in range(2))
    large_ms = measure(lambda: left @ right)
    result: dict[str, Any] = {
        "copy_gb_per_s": 2 * preset.copy_bytes / copy_ms / 1e6,
        "large_product_tflops": 2 * side**3 / large_ms / 1e9,
        "linears": _measure_linears(config, student, measure),
        "attention": _measure_attention(config, student, measure),
    }
    return result | {"floor": _floor(config, student, result)}


class Stopwatch:
    """Milliseconds of one call of a piece of work, repeated over at least ``sample_ms`` of the device's time."""

    def __init__(self, device: torch.device, sample_ms: float):
        self.device = device
        self._sample_ms = sample_ms

    def __call__(self, work: Callable[[], object]) -> float:
        """Mean over the repetitions, after three calls that are not counted."""
        for _ in range(2):
            work()
        wait(self.device)
        start = time.perf_counter()
        work()
        wait(self.device)
        once = 1000 * (time.perf_counter() - start)
        repetitions = min(max(int(self._sample_ms / once), 3), 200)
        instants = Instants(self.device)
        instants("start")
        for _ in range(repetitions):
            work()
        instants("work")
        ((_, taken),) = instants.intervals()
        return taken / repetitions


def _copy_ms(size: int, measure: Stopwatch) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=measure.device).random_()
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source))


def token_shapes(config: Config) -> dict[str, tuple[tuple[int, int], ...]]:
    """(images, tokens per image) of each crop size in a branch: the student's kept images, the teacher's all."""
    crops, images = config.crops, config.train.batch_size_per_gpu
    tokens_global, tokens_local = (
        (size // config.student.patch_size) ** 2 + 1 + config.student.num_register_tokens
        for size in (crops.global_crops_size, crops.local_crops_size)
    )
    keep = 1 - config.student.drop_path_rate

    def kept(count: int) -> int:
        return max(int(count * keep), 1)

    return {
        "student": (
            (kept(2 * images), tokens_global),
            (kept(crops.local_crops_number * images), tokens_local),
        ),
        "teacher": ((2 * images, tokens_global),),
    }


def _rows(config: Config) -> dict[str, int]:
    return {
        network: sum(images * tokens for images, tokens in shapes) for network, shapes in token_shapes(config).items()
    }


def _linears(student: nn.ModuleDict) -> dict[str, nn.Linear]:
    block = student.backbone.blocks[0]
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def _measure_linears(config: Config, student: nn.ModuleDict, measure: Stopwatch) -> dict[str, dict[str, float]]:
    """Milliseconds of the matmuls of each linear map of a block, at the student's and the teacher's rows."""
    rows = _rows(config)
    result = {}
    for name, linear in _linears(student).items():
        weight = _random(linear.out_features, linear.in_features, device=measure.device)
        x = _random(rows["student"], linear.in_features, device=measure.device)
        grad = _random(rows["student"], linear.out_features, device=measure.device)
        seen = _random(rows["teacher"], linear.in_features, device=measure.device)
        works = {
            "student_forward": lambda x=x, w=weight: F.linear(x, w),
            "student_input_gradient": lambda g=grad, w=weight: g @ w,
            "student_weight_gradient": lambda g=grad, x=x: g.t() @ x,
            "teacher_forward": lambda x=seen, w=weight: F.linear(x, w),
        }
        result[name] = {work: measure(run) for work, run in works.items()}
    return result


def _measure_attention(
    config: Config, student: nn.ModuleDict, measure: Stopwatch
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds per shape and backend; a backend that cannot run a shape here is left out."""
    backbone = student.backbone
    head_dim = backbone.embed_dim // backbone.num_heads
    shapes = token_shapes(config)
    cases = {
        "student_global": (*shapes["student"][0], True),
        "student_local": (*shapes["student"][1], True),
        "teacher_global": (*shapes["teacher"][0], False),
    }
    result: dict[str, dict[str, dict[str, float]]] = {}
    for case, (images, tokens, trained) in cases.items():
        # As the projection lays them out: (images, tokens, heads, D / heads), seen with heads before tokens.
        qkv = [
            _random(images, tokens, backbone.num_heads, head_dim, device=measure.device).transpose(1, 2)
            for _ in range(3)
        ]
        result[case] = {}
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    result[case][name] = _attention_times(qkv, trained, measure)
            except RuntimeError:
                continue
    return result


def _attention_times(qkv: list[Tensor], trained: bool, measure: Stopwatch) -> dict[str, float]:
    with torch.no_grad():
        times = {"forward": measure(lambda: F.scaled_dot_product_attention(*qkv))}
    if trained:
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        out = F.scaled_dot_product_attention(*leaves)
        grad = torch.randn_like(out)
        times["backward"] = measure(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    return times


def _floor(config: Config, student: nn.ModuleDict, measured: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step that spends time on these alone, one after another.

    The blocks' matmuls and the fastest attention at their measured times, the other matmuls (heads, patch
    embedding) at the rate of the large one, and one pass over the weights and their state at the copy's bandwidth.
    Norms, gains and residual sums are left out, and no product is left out for being pruned.
    """
    backbone, rows, images = student.backbone, _rows(config), config.train.batch_size_per_gpu
    depth, width = len(backbone.blocks), backbone.embed_dim
    linears = depth * sum(sum(times.values()) for times in measured["linears"].values())
    attention = depth * sum(
        min(sum(times.values()) for times in backends.values()) for backends in measured["attention"].values()
    )
    weights = sum(linear.weight.numel() for linear in _linears(student).values())
    pairs = {
        network: sum(count * tokens**2 for count, tokens in shapes) for network, shapes in token_shapes(config).items()
    }
    in_blocks = depth * sum(
        passes * (2 * weights * rows[network] + 4 * width * pairs[network])
        for network, passes in (("student", 3), ("teacher", 1))
    )
    others = (StepCosts(config).flops(images).model - in_blocks) / measured["large_product_tflops"] / 1e9
    parameters = sum(parameter.numel() for parameter in student.parameters())
    update = UPDATE_BYTES * parameters / measured["copy_gb_per_s"] / 1e6
    total = linears + attention + others + update
    return {
        "block_products_ms": linears,
        "attention_ms": attention,
        "other_products_ms": others,
        "update_ms": update,
        "total_ms": total,
        "img_per_s": 1000 * images / total,
    }


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPE)
