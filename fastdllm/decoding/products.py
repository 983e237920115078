"""Triton kernels of matrix products over few rows, and what all kernels of a pass begin with; `kernels` runs them."""

import triton
import triton.language as tl

WIDEN = tl.constexpr(triton.knobs.runtime.interpret)  # Triton's interpreter would multiply bfloat16 as integers
AHEAD = tl.constexpr(4)  # tiles of weights that each program fetches while the kernel before it still runs
RANK_DEPTH = tl.constexpr(64)  # of an update's rank in one step, at most


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel start; wait for the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def dot(left, right, total):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def dot_tiles(
    rows, weight, row, column, first, last, K: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Return [columns, rows] float32: weight rows `column` times rows `row`, over the tiles of K from first to last.

    The weights stand on the left, since a Hopper product takes 64 from there and as few as 8 from the right. EARLY: the
    next kernel starts before the loop, not behind it. LATE: the kernel before is an EARLY one, whose result the loop
    does not read: wait for it behind the loop.
    """
    if OVERLAP and not LATE:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # of 128 bytes
        LINES: tl.constexpr = (DEPTH + LINE - 1) // LINE
        line = tl.arange(0, LINES) * LINE
        code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        for tile in range(first, tl.minimum(first + AHEAD, last)):
            address = (weight + column[:, None] * K + (tile * DEPTH + line)[None, :]).to(tl.int64)
            tl.inline_asm_elementwise(code, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([column.shape[0], row.shape[0]], tl.float32)
    for tile in range(first, last):
        at = tile * DEPTH + tl.arange(0, DEPTH)
        weight_at = weight + column[:, None] * K + at[None, :]
        rows_at = rows + row[None, :] * K + at[:, None]
        if K % DEPTH == 0:
            left = tl.load(weight_at, eviction_policy="evict_first")
            right = tl.load(rows_at)
        else:
            left = tl.load(weight_at, mask=at[None, :] < K, other=0.0)
            right = tl.load(rows_at, mask=at[:, None] < K, other=0.0)
        total = dot(left, right, total)
    if OVERLAP and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if OVERLAP and LATE:
        tl.extra.cuda.gdc_wait()
    return total


@triton.jit
def add_update(
    total, reduced, expand, gate, row, weight_row, R, RANK: tl.constexpr, SECTIONS: tl.constexpr,
    REDUCED_PARTS: tl.constexpr, FIRST_END: tl.constexpr, SECOND_END: tl.constexpr,
):  # fmt: skip
    """Return total [columns, rows] with an update added to the rows whose gate [R] is not 0.

    That is expand [N, RANK] times what reduced [REDUCED_PARTS, R, SECTIONS * RANK] has for the section that a weight
    row stands in. Zeros stand for other sections and rows: they are exact, and no second total has to be kept.
    """
    SMALL: tl.constexpr = RANK if RANK > 16 else 16
    STEP: tl.constexpr = min(RANK_DEPTH, triton.next_power_of_2(SMALL))
    WIDTH: tl.constexpr = SECTIONS * RANK
    is_gated = tl.load(gate + row, mask=row < R, other=0) != 0
    section_of = (weight_row >= FIRST_END).to(tl.int32) + (weight_row >= SECOND_END).to(tl.int32)
    for section in tl.static_range(SECTIONS):
        is_own = section_of == section
        if tl.max(is_own.to(tl.int32), 0) > 0:
            for start in tl.static_range(0, RANK, STEP):
                at = start + tl.arange(0, STEP)
                left_at = expand + weight_row[:, None] * RANK + at[None, :]
                left = tl.load(left_at, mask=is_own[:, None] & (at < RANK)[None, :], other=0.0)
                right_at = reduced + row[None, :] * WIDTH + section * RANK + at[:, None]
                is_there = is_gated[None, :] & (at < RANK)[:, None]
                right = tl.zeros([STEP, row.shape[0]], tl.float32)
                for part in tl.static_range(REDUCED_PARTS):
                    right += tl.load(right_at + part * R * WIDTH, mask=is_there, other=0.0).to(tl.float32)
                total = dot(left, right.to(left.dtype), total)
    return total


@triton.jit(do_not_specialize=["R"])
def multiply(
    rows, weight, reduced, expand, gate, out, R, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
    SECTIONS: tl.constexpr, REDUCED_PARTS: tl.constexpr, FIRST_END: tl.constexpr, SECOND_END: tl.constexpr,
    EARLY: tl.constexpr, LATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write rows [R, K] times weight [N, K]: out is [PARTS, R, N], or [R, N / 2] if gated.

    The first part holds what `add_update` adds, where there is something to add; before SiLU, if gated.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    per_part: tl.constexpr = tl.cdiv(tl.cdiv(K, DEPTH), PARTS)
    first = tl.program_id(2) * per_part
    last = tl.minimum(first + per_part, tl.cdiv(K, DEPTH))
    paired = tl.minimum(column // 2, N // 2 - 1) + (column % 2) * (N // 2)  # a row of the gate's, one of up's, ...
    weight_row = paired if GATED else tl.minimum(column, N - 1)
    total = dot_tiles(rows, weight, tl.minimum(row, R - 1), weight_row, first, last, K, DEPTH, OVERLAP, EARLY, LATE)
    if reduced is not None:  # noqa: SIM102
        if tl.program_id(2) == 0:  # decided when run, and the one above when compiled
            total = add_update(
                total, reduced, expand, gate, row, weight_row, R, RANK, SECTIONS, REDUCED_PARTS, FIRST_END, SECOND_END
            )
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [COLUMNS // 2, 2, ROWS]), 0, 2, 1))
        total = gate / (1 + tl.exp(-gate)) * up
        column = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        width: tl.constexpr = N // 2
    else:
        out += tl.program_id(2) * R * N
        width: tl.constexpr = N
    is_inside = (row[None, :] < R) & (column[:, None] < width)
    tl.store(out + row[None, :] * width + column[:, None], total.to(out.dtype.element_ty), mask=is_inside)
