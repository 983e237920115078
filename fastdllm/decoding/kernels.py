"""Triton kernels for a forward pass over few rows, where the time goes into reading weights once.

`Kernels` offers what `operations` does in plain torch; its docstrings there hold here. All shapes are static, nothing
waits for the host, and every sum is taken in a fixed order, so a pass can be captured in a CUDA graph and repeats bit
for bit. On Hopper each kernel may start while the one before it still runs (programmatic dependent launch): it fetches
its weights into the L2, then waits for the earlier one to be complete before it touches anything else. Since every
kernel waits, a complete kernel means that all before it are complete.

What is given as `fetch` goes into the L2 as well, for a later kernel: in the kernels between the products by programs
that do nothing else, in a product by each program when its loop over K has ended.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.decoding.operations import Fetch, HeadStatistics, PassRows, has_kernels_for

WIDEN = tl.constexpr(triton.knobs.runtime.interpret)  # Triton's interpreter would multiply bfloat16 as integers
LOWEST = tl.constexpr(-1e30)  # stands for -inf where a difference of two is taken
AHEAD = tl.constexpr(4)  # tiles of weights that each program fetches while the kernel before it still runs
LINES = tl.constexpr(256)  # that a program fetches at a time
PROGRAMS = 264  # aimed at in a product: two for each of an H100's multiprocessors
FETCH = [
    "ahead",
    "first",
    "count",
    "ahead_rows",
    "row_bytes",
    "ahead_parts",
    "part_lines",
    "line_bytes",
]  # of _fetch_share


class Tiles(NamedTuple):
    """How a product is cut up: each program multiplies `rows` rows and `columns` weight rows over a part of K."""

    rows: int
    """16 or more; a power of two, as are columns and depth."""
    columns: int
    """Of the result; gate and up count one each. 64 fill a Hopper product."""
    depth: int
    """Of K in one step; 64 or more."""
    parts: int
    """Programs that share K."""
    warps: int = 4
    stages: int = 4


class Settings(NamedTuple):
    """How the kernels between the products are cut up; heads, rows and places are powers of two."""

    normalize_warps: int = 16
    rotate_heads: int = 1
    """Heads of a row that a program turns, with a warp for each."""
    attend_rows: int = 64
    """Rows of a program, at most; 16 or more, as are places."""
    attend_places: int = 64
    attend_programs: int = PROGRAMS
    """Aimed at by the parts that the places are cut into."""
    attend_warps: int = 4
    attend_stages: int = 2
    merge_heads: int = 1
    """Heads that a program merges, with a warp for each."""
    fetch_programs: int = 96
    """Programs more that fetch what is read next, if anything."""
    fetch_line: int = 128
    """Bytes that a request is to bring: a cache line has 128, in four sectors."""


TILES: dict[tuple[int, int, int], Tiles] = {}  # (rows rounded up to a power of two, N, K) -> best for bfloat16


def default_tiles(num_rows: int, columns: int, depth: int, item_bytes: int) -> Tiles:
    """Return tiles for rows [R, K] times weight [N, K], where none are measured: R, N, K."""
    rows = min(max(16, triton.next_power_of_2(num_rows)), 128)
    width = 64 if rows < 128 else 128
    programs = triton.cdiv(columns, width) * triton.cdiv(num_rows, rows)
    in_part = triton.cdiv(depth, max(1, min(PROGRAMS // programs, 8, depth // 128)) * 128) * 128
    step, stages = 128 if rows < 128 else 64, 8 // item_bytes  # what shared memory holds
    return Tiles(rows, width, step, triton.cdiv(depth, in_part), stages=stages)


SETTINGS = Settings()  # best on an H100


class Kernels:
    """The functions of `operations`, by the kernels below; tensors are contiguous, weights and rows of one dtype."""

    def __init__(
        self,
        tiles: dict[tuple[int, int, int], Tiles] | None = None,
        overlap: bool = False,
        *,
        is_late: bool = False,
        settings: Settings = SETTINGS,
    ):
        """Let each kernel start before the one before has ended (`overlap`), after a product's loop over K if late."""
        self.tiles, self.settings = TILES if tiles is None else tiles, settings
        self.overlap, self.is_late = overlap, is_late

    def multiply(self, rows: Tensor, weight: Tensor, fetch: Fetch | None = None) -> Tensor:
        tiles = self._tiles(len(rows), weight)
        out = rows.new_empty(tiles.parts, len(rows), len(weight), dtype=torch.float32)
        self._multiply(rows, weight, out, tiles, fetch, is_gated=False)
        return out

    def multiply_gated(self, rows: Tensor, weight: Tensor, fetch: Fetch | None = None) -> Tensor:
        tiles = self._tiles(len(rows), weight)._replace(parts=1)
        out = rows.new_empty(len(rows), len(weight) // 2)
        self._multiply(rows, weight, out, tiles, fetch, is_gated=True)
        return out

    def normalize(
        self, hidden: Tensor, parts: Tensor | None, weight: Tensor, epsilon: float, fetch: Fetch | None = None
    ) -> tuple[Tensor, Tensor]:
        (R, C), normed = hidden.shape, torch.empty_like(hidden)
        summed = hidden if parts is None else torch.empty_like(hidden)
        given, count = (hidden, 0) if parts is None else (parts, len(parts))
        sizes = dict(C=C, PARTS=count, BLOCK=triton.next_power_of_2(C))
        arguments = (given, hidden, weight, summed, normed, epsilon, R, *self._share(fetch, R, weight))
        grid = (R + self._fetchers(fetch),)
        self._launch(_normalize, grid, *arguments, warps=self.settings.normalize_warps, **sizes)
        return summed, normed

    def rotate_and_store(
        self,
        parts: Tensor,
        bias: Tensor,
        angles: Tensor,
        rows: PassRows,
        keys: Tensor,
        values: Tensor,
        fetch: Fetch | None = None,
    ) -> Tensor:
        (B, T), (_, G, capacity, E) = rows.positions.shape, keys.shape
        H, heads = len(bias) // E - 2 * G, self.settings.rotate_heads
        query = keys.new_empty(B, T, H, E)
        where = (angles, angles[1], rows.positions, rows.places, rows.slots)
        sizes = dict(PARTS=len(parts), H=H, G=G, E=E, HEADS=heads)
        arguments = (parts, bias, *where, query, keys, values, B * T, T, capacity, *self._share(fetch, B * T, bias))
        grid = (B * T * triton.cdiv(H + 2 * G, heads) + self._fetchers(fetch),)
        self._launch(_rotate_and_store, grid, *arguments, warps=heads, **sizes)
        return query

    def attend_slots(
        self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, limits: Tensor, fetch: Fetch | None = None
    ) -> Tensor:
        (B, T, H, E), (_, G, capacity, _) = query.shape, keys.shape
        if not has_kernels_for(E):
            raise ValueError(f"the kernels need a head size of 16, 32, 64, ..., got {E}; take `operations` instead.")
        settings, R = self.settings, B * T * H
        rows = min(settings.attend_rows, max(16, triton.next_power_of_2(T * H // G)))
        programs = triton.cdiv(T * H // G, rows) * B * G
        most = triton.cdiv(capacity, settings.attend_places)
        parts = max(1, min(settings.attend_programs // programs, 16, most))
        out = torch.empty_like(query)
        sums = query.new_empty(parts, R, E, dtype=torch.float32) if parts > 1 else out
        weights = query.new_empty(2, parts, R, dtype=torch.float32)
        scale = 1.4426950408889634 * E**-0.5  # of exp2
        given = (query, keys, values, slots, limits, sums, weights, scale, B, T, capacity)
        sizes = dict(H=H, G=G, E=E, ROWS=rows, PLACES=settings.attend_places, PARTS=parts)
        run = dict(warps=settings.attend_warps, stages=settings.attend_stages)
        grid = (programs * parts + self._fetchers(fetch),)
        self._launch(_attend, grid, *given, *self._share(fetch, B * T, query), **run, **sizes)
        if parts > 1:
            heads = settings.merge_heads
            sizes = dict(E=E, PARTS=parts, BLOCK=triton.next_power_of_2(parts), HEADS=heads)
            self._launch(_merge_attention, (triton.cdiv(R, heads),), sums, weights, out, R, warps=heads, **sizes)
        return out

    def head_statistics(self, hidden: Tensor, head: Tensor, banned: int) -> HeadStatistics:
        (R, C), V, tiles = hidden.shape, len(head), self._tiles(len(hidden), head)
        count = triton.cdiv(V, tiles.columns)
        numbers = hidden.new_empty(4, R, count, dtype=torch.float32)
        indices = hidden.new_empty(R, count, dtype=torch.int32)
        sizes = dict(V=V, C=C, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth)
        run = dict(warps=tiles.warps, stages=tiles.stages)
        grid = (triton.cdiv(R, tiles.rows), count)
        self._launch(_head_tile, grid, hidden, head, numbers, indices, banned, R, LATE=self.is_late, **run, **sizes)
        best, results = indices.new_empty(R, dtype=torch.int64), numbers.new_empty(4, R)
        sizes = dict(COUNT=count, BLOCK=triton.next_power_of_2(count))
        self._launch(_merge_statistics, (R,), numbers, indices, best, results, R, **sizes)
        return HeadStatistics(best, *results)

    def _tiles(self, num_rows: int, weight: Tensor) -> Tiles:
        key, item_bytes = (max(16, triton.next_power_of_2(num_rows)), *weight.shape), weight.element_size()
        is_measured = key in self.tiles and item_bytes == 2
        return self.tiles[key] if is_measured else default_tiles(num_rows, *weight.shape, item_bytes)

    def _multiply(
        self, rows: Tensor, weight: Tensor, out: Tensor, tiles: Tiles, fetch: Fetch | None, is_gated: bool
    ) -> None:
        (R, K), N = rows.shape, len(weight)
        grid = (triton.cdiv(R, tiles.rows), triton.cdiv(N, tiles.columns), tiles.parts)
        sizes = dict(N=N, K=K, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, PARTS=tiles.parts)
        run = dict(warps=tiles.warps, stages=tiles.stages, GATED=is_gated, LATE=self.is_late)
        self._launch(_multiply, grid, rows, weight, out, R, *self._share(fetch, R, weight), **run, **sizes)

    def _share(self, fetch: Fetch | None, num_rows: int, other: Tensor) -> tuple[Tensor | int, ...]:
        """Return the arguments named in FETCH: the same lines of every part that a product of num_rows is cut into."""
        line = self.settings.fetch_line
        if fetch is None:
            return other, 0, 0, 0, 0, 1, 0, line
        (_, K), tiles, item_bytes = fetch.weight.shape, self._tiles(num_rows, fetch.weight), fetch.weight.element_size()
        steps = triton.cdiv(triton.cdiv(K, tiles.depth), tiles.parts)
        part_lines = triton.cdiv(steps * tiles.depth * item_bytes, line)
        num_bytes = fetch.num_rows * K * item_bytes
        first, end = (triton.cdiv(at * part_lines, num_bytes) for at in (fetch.first_byte, fetch.end_byte))
        return fetch.weight, first, end - first, fetch.num_rows, K * item_bytes, tiles.parts, part_lines, line

    def _fetchers(self, fetch: Fetch | None) -> int:
        return self.settings.fetch_programs if fetch is not None else 0

    def _launch(self, kernel, grid: tuple, *arguments, warps: int = 4, stages: int = 1, **sizes) -> None:
        options = dict(launch_pdl=True) if self.overlap else {}
        kernel[grid](*arguments, **sizes, OVERLAP=self.overlap, num_warps=warps, num_stages=stages, **options)


@triton.jit
def _follow(OVERLAP: tl.constexpr, LATE: tl.constexpr):
    """Let the next kernel start, if not late; wait for the one before."""
    if OVERLAP:
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _dot(left, right, total):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _fetch(address):
    """Ask for the cache lines at the addresses without waiting for them."""
    code: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    if not WIDEN:  # assembly does not run in the interpreter
        tl.inline_asm_elementwise(code, "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _fetch_share(share, shares, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes):
    """Fetch one of `shares` shares of the lines from `first` on, `count` of them, of every part of every row."""
    lines = ahead_rows * ahead_parts * count
    for start in range(share * LINES, lines, shares * LINES):
        line = tl.minimum(start + tl.arange(0, LINES), lines - 1)
        part, row = line // count % ahead_parts, line // (count * ahead_parts)
        in_row = tl.minimum(part * part_lines + first + line % count, (row_bytes - 1) // line_bytes)
        offset = row.to(tl.int64) * row_bytes + in_row * line_bytes
        _fetch(ahead.to(tl.pointer_type(tl.int8), bitcast=True) + offset)


@triton.jit
def _dot_tiles(
    rows, weight, row, column, first, last,
    K: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Return [columns, rows] float32: weight rows `column` times rows `row`, over the tiles of K from first to last.

    The weights stand on the left, since a Hopper product takes 64 from there and as few as 8 from the right.
    """
    if OVERLAP:
        line = tl.arange(0, DEPTH // 64) * 64
        for tile in range(first, tl.minimum(first + AHEAD, last)):
            _fetch(weight + column[:, None] * K + (tile * DEPTH + line)[None, :])
    _follow(OVERLAP, LATE)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([column.shape[0], row.shape[0]], tl.float32)
    for tile in range(first, last):
        at = tile * DEPTH + depth
        weight_at = weight + column[:, None] * K + at[None, :]
        rows_at = rows + row[None, :] * K + at[:, None]
        if K % DEPTH == 0:
            left = tl.load(weight_at, eviction_policy="evict_first")
            right = tl.load(rows_at)
        else:
            left = tl.load(weight_at, mask=at[None, :] < K, other=0.0)
            right = tl.load(rows_at, mask=at[:, None] < K, other=0.0)
        total = _dot(left, right, total)
    if OVERLAP and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    return total


@triton.jit(do_not_specialize=["R", *FETCH])
def _multiply(
    rows, weight, out, R, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, LATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write rows [R, K] times weight [N, K]: out is [PARTS, R, N] float32, or [R, N / 2] if gated."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    per_part: tl.constexpr = tl.cdiv(tl.cdiv(K, DEPTH), PARTS)
    tile = tl.program_id(2) * per_part
    last = tl.minimum(tile + per_part, tl.cdiv(K, DEPTH))
    paired = tl.minimum(column // 2, N // 2 - 1) + (column % 2) * (N // 2)  # a row of the gate's, one of up's, ...
    weight_row = paired if GATED else tl.minimum(column, N - 1)
    total = _dot_tiles(rows, weight, tl.minimum(row, R - 1), weight_row, tile, last, K, DEPTH, OVERLAP, LATE)
    share = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    shares = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    _fetch_share(share, shares, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes)
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


@triton.jit(do_not_specialize=["R", *FETCH])
def _normalize(
    parts, hidden, weight, summed, normed, epsilon, R,
    ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write hidden [R, C] plus parts [PARTS, R, C], and its RMSNorm; a program takes a row."""
    row = tl.program_id(0)
    if row >= R:
        shares = tl.num_programs(0) - R
        _fetch_share(row - R, shares, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes)
        return
    column = tl.arange(0, BLOCK)
    is_inside = column < C
    scale = tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
    _follow(OVERLAP, False)
    total = tl.load(hidden + row * C + column, mask=is_inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            total += tl.load(parts + (part * R + row) * C + column, mask=is_inside, other=0.0).to(tl.float32)
        rounded = total.to(summed.dtype.element_ty)
        tl.store(summed + row * C + column, rounded, mask=is_inside)
        total = rounded.to(tl.float32)
    mean = tl.sum(total * total, 0) / C
    result = total * (1 / tl.sqrt(mean + epsilon)) * scale
    tl.store(normed + row * C + column, result.to(normed.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["R", "T", *FETCH])
def _rotate_and_store(
    parts, bias, cosine, sine, positions, places, slots, query, keys, values, R, T, capacity,
    ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes,
    PARTS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up parts and bias, turn queries and keys; a program takes HEADS heads of one row, as their two halves."""
    blocks: tl.constexpr = tl.cdiv(H + 2 * G, HEADS)
    share, shares = tl.program_id(0) - R * blocks, tl.num_programs(0) - R * blocks
    if share >= 0:
        _fetch_share(share, shares, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes)
        return
    row, half = tl.program_id(0) // blocks, tl.arange(0, E // 2)[None, :]
    head = (tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.minimum(head, H + 2 * G - 1) * E + half
    left = tl.load(bias + at).to(tl.float32)
    right = tl.load(bias + at + E // 2).to(tl.float32)
    _follow(OVERLAP, False)
    for part in tl.static_range(PARTS):
        source = parts + (part * R + row) * ((H + 2 * G) * E) + at
        left += tl.load(source).to(tl.float32)
        right += tl.load(source + E // 2).to(tl.float32)
    angle = tl.load(positions + row) * (E // 2) + half
    is_turned = head < H + G
    cos = tl.where(is_turned, tl.load(cosine + angle), 1.0)
    sin = tl.where(is_turned, tl.load(sine + angle), 0.0)
    turned = (left * cos - right * sin).to(query.dtype.element_ty)
    turned_right = (right * cos + left * sin).to(query.dtype.element_ty)
    group = tl.maximum(head - H, 0) % G
    place = ((tl.load(slots + row // T) * G + group) * capacity + tl.load(places + row)) * E + half
    is_query, is_key = (head < H) & (half >= 0), (head >= H) & is_turned & (half >= 0)
    is_value = (head >= H + G) & (head < H + 2 * G) & (half >= 0)
    query_at = query + (row * H + head) * E + half
    tl.store(query_at, turned, mask=is_query)
    tl.store(query_at + E // 2, turned_right, mask=is_query)
    tl.store(keys + place, turned, mask=is_key)
    tl.store(keys + place + E // 2, turned_right, mask=is_key)
    tl.store(values + place, turned, mask=is_value)
    tl.store(values + place + E // 2, turned_right, mask=is_value)


@triton.jit(do_not_specialize=["B", "T", *FETCH])
def _attend(
    query, keys, values, slots, limits, sums, weights, scale, B, T, capacity,
    ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr,
    PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend for ROWS of the T * H / G rows that share a key head, over a part of the places that they see.

    With one part, sums is the output; with more, it takes sums [PARTS, B * T * H, E] whose weights, and the largest
    score behind them, go to weights [2, PARTS, B * T * H].
    """
    blocks = tl.cdiv(T * (H // G), ROWS)
    share, shares = tl.program_id(0) - blocks * B * G * PARTS, tl.num_programs(0) - blocks * B * G * PARTS
    if share >= 0:
        _fetch_share(share, shares, ahead, first, count, ahead_rows, row_bytes, ahead_parts, part_lines, line_bytes)
        return
    block, slab = tl.program_id(0) % blocks, tl.program_id(0) // blocks % (B * G)
    sequence, group, part = slab // G, slab % G, tl.program_id(0) // (blocks * B * G)
    row, entry = block * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    token, head = row // (H // G), group * (H // G) + row % (H // G)
    is_inside = token < T
    at = (sequence * T + token) * H + head
    _follow(OVERLAP, False)
    limit = tl.load(limits + sequence * T + token, mask=is_inside, other=0)
    slab = (tl.load(slots + sequence) * G + group) * capacity * E
    queries = tl.load(query + at[:, None] * E + entry[None, :], mask=is_inside[:, None], other=0.0)
    count = tl.cdiv(tl.max(limit, 0), PLACES).to(tl.int32)
    per_part = tl.cdiv(count, PARTS)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, E], tl.float32)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, count)):
        place = tile * PLACES + tl.arange(0, PLACES)
        is_there = place < capacity
        key = tl.load(keys + slab + place[None, :] * E + entry[:, None], mask=is_there[None, :], other=0.0)
        scores = _dot(queries, key, tl.zeros([ROWS, PLACES], tl.float32)) * scale
        scores = tl.where(place[None, :] < limit[:, None], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        probability = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(probability, 1)
        value = tl.load(values + slab + place[:, None] * E + entry[None, :], mask=is_there[:, None], other=0.0)
        total = _dot(probability.to(value.dtype), value, total * shrink[:, None])
        highest = higher
    if PARTS == 1:
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    else:
        sums += part * B * T * H * E
        tl.store(weights + part * B * T * H + at, highest, mask=is_inside)
        tl.store(weights + (PARTS + part) * B * T * H + at, weight, mask=is_inside)
    tl.store(sums + at[:, None] * E + entry[None, :], total.to(sums.dtype.element_ty), mask=is_inside[:, None])


@triton.jit(do_not_specialize=["R"])
def _merge_attention(
    sums, weights, out, R,
    E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write the weighted mean over the parts; a program takes HEADS heads of the rows, R are all of them."""
    part, head = tl.arange(0, BLOCK)[:, None], (tl.program_id(0) * HEADS + tl.arange(0, HEADS))[None, :]
    entry, is_inside = tl.arange(0, E), (part < PARTS) & (head < R)
    _follow(OVERLAP, False)
    highest = tl.load(weights + part * R + head, mask=is_inside, other=LOWEST)
    scale = tl.exp2(highest - tl.max(highest, 0)[None, :])
    weight = tl.sum(scale * tl.load(weights + (PARTS + part) * R + head, mask=is_inside, other=0.0), 0)
    at = ((part * R + head) * E)[:, :, None] + entry[None, None, :]
    total = tl.sum(scale[:, :, None] * tl.load(sums + at, mask=is_inside[:, :, None], other=0.0), 0)  # [HEADS, E]
    result = total / tl.where(weight > 0, weight, 1.0)[:, None]
    at = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    tl.store(out + at * E + entry[None, :], result.to(out.dtype.element_ty), mask=at < R)


@triton.jit(do_not_specialize=["R"])
def _head_tile(
    hidden, head, numbers, indices, banned, R,
    V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    LATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of the vocabulary, for each row of hidden [R, C], to a best index and four numbers.

    These are numbers [4, R, tiles]: the best logit, the second, the sum of exp(logit - best), and the sum of
    (logit - best) * exp(logit - best).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight_row, tiles = tl.minimum(column, V - 1), tl.cdiv(C, DEPTH)
    logits = _dot_tiles(hidden, head, tl.minimum(row, R - 1), weight_row, 0, tiles, C, DEPTH, OVERLAP, LATE)
    is_allowed = (column < V) & (column != banned)
    logits = tl.where(is_allowed[:, None], logits, -float("inf"))
    best = tl.max(logits, 0)
    index = tl.min(tl.where(logits == best[None, :], column[:, None], V), 0)
    second = tl.max(tl.where(column[:, None] == index[None, :], -float("inf"), logits), 0)
    below = tl.maximum(logits, LOWEST) - tl.maximum(best, LOWEST)[None, :]
    weight = tl.where(is_allowed[:, None], tl.exp(below), 0.0)
    count: tl.constexpr = tl.cdiv(V, COLUMNS)
    at = row * count + tl.program_id(1)
    is_inside = row < R
    tl.store(indices + at, index, mask=is_inside)
    tl.store(numbers + at, best, mask=is_inside)
    tl.store(numbers + R * count + at, second, mask=is_inside)
    tl.store(numbers + 2 * R * count + at, tl.sum(weight, 0), mask=is_inside)
    tl.store(numbers + 3 * R * count + at, tl.sum(weight * below, 0), mask=is_inside)


@triton.jit(do_not_specialize=["R"])
def _merge_statistics(
    numbers, indices, best, results, R, COUNT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Merge the COUNT tiles of a row: best [R], and results [4, R] in the order of HeadStatistics."""
    row, tile = tl.program_id(0), tl.arange(0, BLOCK)
    at, is_inside = row * COUNT + tile, tile < COUNT
    _follow(OVERLAP, False)
    top = tl.load(numbers + at, mask=is_inside, other=-float("inf"))
    second = tl.load(numbers + R * COUNT + at, mask=is_inside, other=-float("inf"))
    weight = tl.load(numbers + 2 * R * COUNT + at, mask=is_inside, other=0.0)
    weighted = tl.load(numbers + 3 * R * COUNT + at, mask=is_inside, other=0.0)
    index = tl.load(indices + at, mask=is_inside, other=2147483647)
    highest = tl.max(top, 0)
    chosen = tl.min(tl.where(top == highest, index, 2147483647), 0)
    below = tl.maximum(top, LOWEST) - highest
    scale = tl.exp(below)
    total = tl.sum(weight * scale, 0)
    log_total = tl.log(total)
    tl.store(best + row, chosen.to(tl.int64))
    tl.store(results + row, highest)
    tl.store(results + R + row, highest + log_total)
    tl.store(results + 2 * R + row, tl.max(tl.where(index == chosen, second, top), 0))
    tl.store(results + 3 * R + row, log_total - tl.sum((weighted + below * weight) * scale, 0) / total)
