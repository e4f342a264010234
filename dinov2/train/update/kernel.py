"""The Triton kernel of `FusedWeightUpdate`: AdamW, moving average and low-precision weights in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of tensors (int64, a row per weight): addresses, then numbers. A missing tensor has address 0.
STUDENT, TEACHER, STUDENT_LOW, TEACHER_LOW, GRADIENT, EXP_AVG, EXP_AVG_SQ, STEP, SIZE, MODULE, FLAGS, COLUMNS = map(
    tl.constexpr, range(12)
)

TRAINED = tl.constexpr(1)  # has a gradient; without one only the moving average runs
ALIGNED = tl.constexpr(2)  # addresses are multiples of 16 bytes and the size of 4 elements: vector accesses
STUDENT_LOW_FP16 = tl.constexpr(4)  # else bfloat16
TEACHER_LOW_FP16 = tl.constexpr(8)

# Columns of the table of rates (float64, a row per weight).
RATES = tl.constexpr(5)  # learning rate, weight decay, log beta1, log beta2, eps


@triton.jit
def _addresses(address, offsets, element: tl.constexpr, aligned: tl.constexpr):
    addresses = address.to(tl.pointer_type(element)) + offsets
    return tl.multiple_of(addresses, 16) if aligned else addresses


@triton.jit
def _store_low(address, is_fp16, offsets, values, mask, aligned: tl.constexpr):
    if address != 0:
        if is_fp16:
            tl.store(_addresses(address, offsets, tl.float16, aligned), values.to(tl.float16), mask)
        else:
            # To nearest, ties to even, on the bits: Triton's interpreter truncates where it casts to bfloat16.
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
            tl.store(_addresses(address, offsets, tl.uint16, aligned), rounded, mask)


@triton.jit
def _update_chunk(
    row,
    rate,
    clip,
    ema_weight,
    start,
    trained: tl.constexpr,
    aligned: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = tl.load(row + SIZE)
    if aligned:
        size = tl.multiple_of(size, 4)
    flags = tl.load(row + FLAGS)
    student_at, teacher_at = tl.load(row + STUDENT), tl.load(row + TEACHER)
    student_low_at, teacher_low_at = tl.load(row + STUDENT_LOW), tl.load(row + TEACHER_LOW)
    teacher_size = tl.where(teacher_at == 0, 0, size)  # a term of the loss has no teacher
    if aligned:
        teacher_size = tl.multiple_of(teacher_size, 4)
    if trained:
        gradient_at = tl.load(row + GRADIENT)
        exp_avg_at, exp_avg_sq_at = tl.load(row + EXP_AVG), tl.load(row + EXP_AVG_SQ)
        factor = tl.load(clip + tl.load(row + MODULE))
        # In double precision: 1 - beta^step loses five digits in single.
        step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
        lr, decay = tl.load(rate), tl.load(rate + 1)
        log_beta1, log_beta2 = tl.load(rate + 2), tl.load(rate + 3)
        keep = (1 - lr * decay).to(tl.float32)
        gain1, gain2 = (1 - tl.exp(log_beta1)).to(tl.float32), (1 - tl.exp(log_beta2)).to(tl.float32)
        step_size = (lr / (1 - tl.exp(step * log_beta1))).to(tl.float32)
        root = tl.sqrt(1 - tl.exp(step * log_beta2)).to(tl.float32)
        eps = tl.load(rate + 4).to(tl.float32)
    # Also past the end of a small tensor, where the mask stops all traffic: constant bounds suit every interpreter.
    for done in range(0, CHUNK, BLOCK):
        offsets = start + done + tl.arange(0, BLOCK)
        mask, averaged = offsets < size, offsets < teacher_size
        student_addresses = _addresses(student_at, offsets, tl.float32, aligned)
        teacher_addresses = _addresses(teacher_at, offsets, tl.float32, aligned)
        student, teacher = (tl.load(student_addresses, mask), tl.load(teacher_addresses, averaged))
        if trained:
            exp_avg_addresses = _addresses(exp_avg_at, offsets, tl.float32, aligned)
            exp_avg_sq_addresses = _addresses(exp_avg_sq_at, offsets, tl.float32, aligned)
            gradient = factor * tl.load(_addresses(gradient_at, offsets, tl.float32, aligned), mask)
            exp_avg, exp_avg_sq = tl.load(exp_avg_addresses, mask), tl.load(exp_avg_sq_addresses, mask)
            exp_avg += gain1 * (gradient - exp_avg)
            exp_avg_sq += gain2 * (gradient * gradient - exp_avg_sq)
            student = keep * student - step_size * exp_avg / (tl.sqrt(exp_avg_sq) / root + eps)
            tl.store(exp_avg_addresses, exp_avg, mask)
            tl.store(exp_avg_sq_addresses, exp_avg_sq, mask)
            tl.store(student_addresses, student, mask)
        difference = student - teacher
        # As torch.lerp: exact at both ends.
        near, far = teacher + ema_weight * difference, student - (1 - ema_weight) * difference
        teacher = tl.where(ema_weight < 0.5, near, far)
        tl.store(teacher_addresses, teacher, averaged)
        _store_low(student_low_at, flags & STUDENT_LOW_FP16, offsets, student, mask, aligned)
        _store_low(teacher_low_at, flags & TEACHER_LOW_FP16, offsets, teacher, mask, aligned)


@triton.jit
def weight_update_kernel(
    table: tl.tensor,
    rates: tl.tensor,
    chunks: tl.tensor,
    clip: tl.tensor,
    all_finite: tl.tensor,
    ema_weight: float,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per chunk of one tensor.

    Args:
        table, rates: int64 (T, COLUMNS) and float64 (T, RATES).
        chunks: int64 (programs, 2), row of the table and first element, a multiple of CHUNK.
        clip: float32 (M,), factor of each module's gradients.
        all_finite: float32, 0 to change nothing.
        ema_weight: part of the way from teacher to student.
        CHUNK: elements per program, a multiple of BLOCK.
        BLOCK: elements at once: 4 per thread, so that 16 bytes are loaded and no layout is converted.
    """
    if tl.load(all_finite) == 0:
        return
    chunk = chunks + 2 * tl.program_id(0)
    tensor, start = tl.load(chunk), tl.multiple_of(tl.load(chunk + 1), BLOCK)
    row, rate = table + tensor * COLUMNS, rates + tensor * RATES
    flags = tl.load(row + FLAGS)
    if flags & TRAINED == 0:
        _update_chunk(row, rate, clip, ema_weight, start, False, False, CHUNK, BLOCK)
    elif flags & ALIGNED:
        _update_chunk(row, rate, clip, ema_weight, start, True, True, CHUNK, BLOCK)
    else:
        _update_chunk(row, rate, clip, ema_weight, start, True, False, CHUNK, BLOCK)


# With TRITON_INTERPRET=1 at import the kernel runs on CPU tensors, slowly.
IS_INTERPRETED = not isinstance(weight_update_kernel, triton.JITFunction)
