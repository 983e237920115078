"""Triton kernels for a forward pass over few rows, where the time goes into reading weights once.

`Kernels` offers what `operations` does in plain torch; its docstrings there hold here. All shapes are static, nothing
waits for the host, and every sum is taken in a fixed order, so a pass can be captured in a CUDA graph and repeats bit
for bit. On Hopper each kernel may start while the one before it still runs (programmatic dependent launch): it fetches
its weights into the L2, then waits for the earlier one to be complete before it touches anything else. Since every
kernel waits, a complete kernel means that all before it are complete. A product lets the next one start only when its
loop over K has ended: at its beginning was measured to be slower. What reduces rows to an update's rank is so small
that it leaves room for the next one: it lets that start as soon as it has itself waited, so that the rows are complete,
and that product waits for it only behind its own loop, which needs nothing but the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.decoding.operations import HeadStatistics, PassRows, has_kernels_for
from fastdllm.decoding.products import dot, dot_tiles, follow, multiply
from fastdllm.decoding.tiles import TILES, Settings, Tiles, TileTable, default_tiles, reducing_tiles
from fastdllm.decoding.updates import LowRankUpdate

PLAIN = dict(RANK=1, SECTIONS=1, REDUCED_PARTS=1, FIRST_END=0, SECOND_END=0, EARLY=False, LATE=False)  # a product alone
LOWEST = tl.constexpr(-1e30)  # stands for -inf where a difference of two is taken


class Kernels:
    """The functions of `operations`, by the kernels below; tensors are contiguous, weights and rows of one dtype."""

    def __init__(self, tiles: TileTable | None = None, overlap: bool = False, settings: Settings | None = None):
        """Take the measured tiles if None; with `overlap`, each kernel starts before the one before has ended."""
        self.tiles, self.overlap, self.settings = TILES if tiles is None else tiles, overlap, settings or Settings()

    def multiply(self, rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor:
        return self._multiply(rows, weight, update, is_gated=False)

    def multiply_gated(self, rows: Tensor, weight: Tensor, update: LowRankUpdate | None = None) -> Tensor:
        return self._multiply(rows, weight, update, is_gated=True)

    def normalize(self, hidden: Tensor, parts: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        (R, C), normed = hidden.shape, torch.empty_like(hidden)
        summed = hidden if parts is None else torch.empty_like(hidden)
        given, count = (hidden, 0) if parts is None else (parts, len(parts))
        sizes = dict(C=C, PARTS=count, BLOCK=triton.next_power_of_2(C), warps=self.settings.normalize_warps)
        self._launch(_normalize, (R,), given, hidden, weight, summed, normed, epsilon, R, **sizes)
        return summed, normed

    def rotate_and_store(
        self, parts: Tensor, bias: Tensor, angles: Tensor, rows: PassRows, keys: Tensor, values: Tensor
    ) -> Tensor:
        (B, T), (_, G, capacity, E) = rows.positions.shape, keys.shape
        H, heads = len(bias) // E - 2 * G, self.settings.rotate_heads
        query = keys.new_empty(B, T, H, E)
        where = (angles, angles[1], rows.positions, rows.places, rows.slots)
        sizes = dict(PARTS=len(parts), H=H, G=G, E=E, HEADS=heads)
        grid, arguments = (B * T * triton.cdiv(H + 2 * G, heads),), (query, keys, values, B * T, T, capacity)
        self._launch(_rotate_and_store, grid, parts, bias, *where, *arguments, warps=heads, **sizes)
        return query

    def attend_slots(self, query: Tensor, keys: Tensor, values: Tensor, where: PassRows) -> Tensor:
        (B, T, H, E), (_, G, capacity, _) = query.shape, keys.shape
        if not has_kernels_for(E):
            raise ValueError(f"the kernels need a head size of 16, 32, 64, ..., got {E}; take `operations` instead.")
        settings, R = self.settings, B * T * H
        rows = min(settings.attend_rows, max(16, triton.next_power_of_2(T * H // G)))
        blocks, most = triton.cdiv(T * H // G, rows), triton.cdiv(capacity, settings.attend_places)
        parts = max(1, min(settings.attend_programs // (blocks * B * G), 16, most))
        out = torch.empty_like(query)
        sums = query.new_empty(parts, R, E, dtype=torch.float32) if parts > 1 else out
        weights = query.new_empty(2, parts, R, dtype=torch.float32)
        scale = 1.4426950408889634 * E**-0.5  # of exp2
        seen = (where.slots, where.limits, where.own_firsts, where.own_ends)
        arguments = (query, keys, values, *seen, sums, weights, scale, B, T, capacity)
        sizes = dict(H=H, G=G, E=E, ROWS=rows, PLACES=settings.attend_places, PARTS=parts)
        sizes |= dict(warps=settings.attend_warps, stages=settings.attend_stages)
        self._launch(_attend, (blocks, B * G, parts), *arguments, **sizes)
        if parts > 1:
            sizes = dict(E=E, PARTS=parts, BLOCK=triton.next_power_of_2(parts))
            self._launch(_merge_attention, (R,), sums, weights, out, R, warps=1, **sizes)
        return out

    def head_statistics(self, hidden: Tensor, head: Tensor, banned: int) -> HeadStatistics:
        (R, C), V, tiles = hidden.shape, len(head), self._tiles(hidden, head)
        count = triton.cdiv(V, tiles.columns)
        numbers = hidden.new_empty(4, R, count, dtype=torch.float32)
        indices = hidden.new_empty(R, count, dtype=torch.int32)
        sizes = dict(V=V, C=C, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth)
        run, grid = dict(warps=tiles.warps, stages=tiles.stages), (triton.cdiv(R, tiles.rows), count)
        self._launch(_head_tile, grid, hidden, head, numbers, indices, banned, R, **run, **sizes)
        best, results = indices.new_empty(R, dtype=torch.int64), numbers.new_empty(4, R)
        sizes = dict(COUNT=count, BLOCK=triton.next_power_of_2(count))
        self._launch(_merge_statistics, (R,), numbers, indices, best, results, R, **sizes)
        return HeadStatistics(best, *results)

    def _tiles(self, rows: Tensor, weight: Tensor) -> Tiles:
        key, item_bytes = (max(16, triton.next_power_of_2(len(rows))), *weight.shape), weight.element_size()
        is_measured = key in self.tiles and item_bytes == 2
        return self.tiles[key] if is_measured else default_tiles(len(rows), *weight.shape, item_bytes)

    def _multiply(self, rows: Tensor, weight: Tensor, update: LowRankUpdate | None, is_gated: bool) -> Tensor:
        R, N, tiles = len(rows), len(weight), self._tiles(rows, weight)
        shape, dtype = ((1, R, N // 2), rows.dtype) if is_gated else ((tiles.parts, R, N), torch.float32)
        out = rows.new_empty(shape, dtype=dtype)
        if update is None:
            self._product(rows, weight, out, tiles, GATED=is_gated)
        else:
            reduced, (first_end, second_end) = self._reduce(rows, update), (*update.ends, N)[:2]
            added = (reduced, update.expand, update.gate.view(torch.int8))
            sizes = dict(RANK=update.expand.shape[1], SECTIONS=len(update.ends), REDUCED_PARTS=len(reduced))
            sizes |= dict(FIRST_END=first_end, SECOND_END=second_end, LATE=self.settings.starts_early)
            self._product(rows, weight, out, tiles, added, GATED=is_gated, **sizes)
        return out[0] if is_gated else out

    def _reduce(self, rows: Tensor, update: LowRankUpdate) -> Tensor:
        """Return rows [R, K] times the reducing matrix, [P, R, S * rank]; float32 where P is above 1."""
        tiles = reducing_tiles(*rows.shape, rows.element_size(), self.settings)
        dtype = rows.dtype if tiles.parts == 1 else torch.float32
        out = rows.new_empty(tiles.parts, len(rows), len(update.reduce), dtype=dtype)
        self._product(rows, update.reduce, out, tiles, GATED=False, EARLY=self.settings.starts_early)
        return out

    def _product(
        self,
        rows: Tensor,
        weight: Tensor,
        out: Tensor,
        tiles: Tiles,
        added: tuple = (None, None, None),
        **sizes: int,
    ) -> None:
        """Write a product into out [P, R, ...], with what is `added` in its first part."""
        (R, K), N = rows.shape, len(weight)
        grid = (triton.cdiv(R, tiles.rows), triton.cdiv(N, tiles.columns), len(out))
        own = dict(N=N, K=K, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, PARTS=len(out))
        arguments, run = (rows, weight, *added, out, R), dict(warps=tiles.warps, stages=tiles.stages)
        self._launch(multiply, grid, *arguments, **run, **(PLAIN | own | sizes))

    def _launch(self, kernel, grid: tuple, *arguments, warps: int = 4, stages: int = 1, **sizes) -> None:
        options = dict(launch_pdl=True) if self.overlap else {}
        kernel[grid](*arguments, **sizes, OVERLAP=self.overlap, num_warps=warps, num_stages=stages, **options)


@triton.jit(do_not_specialize=["R"])
def _normalize(
    parts, hidden, weight, summed, normed, epsilon, R,
    C: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write hidden [R, C] plus parts [PARTS, R, C], and its RMSNorm; a program takes a row."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    is_inside = column < C
    scale = tl.load(weight + column, mask=is_inside, other=0.0).to(tl.float32)
    follow(OVERLAP)
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


@triton.jit(do_not_specialize=["R", "T"])
def _rotate_and_store(
    parts, bias, cosine, sine, positions, places, slots, query, keys, values, R, T, capacity, PARTS: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up parts and bias, turn queries and keys; a program takes HEADS heads of one row, as their two halves."""
    blocks: tl.constexpr = tl.cdiv(H + 2 * G, HEADS)
    row, half = tl.program_id(0) // blocks, tl.arange(0, E // 2)[None, :]
    head = (tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.minimum(head, H + 2 * G - 1) * E + half
    left, right = tl.load(bias + at).to(tl.float32), tl.load(bias + at + E // 2).to(tl.float32)
    follow(OVERLAP)
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
    is_key, is_value = (head >= H) & is_turned, (head >= H + G) & (head < H + 2 * G)
    tl.store(query + (row * H + head) * E + half, turned, mask=head < H)
    tl.store(query + (row * H + head) * E + half + E // 2, turned_right, mask=head < H)
    tl.store(keys + place, turned, mask=is_key)
    tl.store(keys + place + E // 2, turned_right, mask=is_key)
    tl.store(values + place, turned, mask=is_value)
    tl.store(values + place + E // 2, turned_right, mask=is_value)


@triton.jit
def _attend_tile(queries, keys, values, place, entry, is_seen, capacity, scale, highest, weight, total):
    """Return the largest score, the sum of weights and the weighted sum, with the seen ones of these places added."""
    is_there = place < capacity
    key = tl.load(keys + place[None, :] * entry.shape[0] + entry[:, None], mask=is_there[None, :], other=0.0)
    scores = dot(queries, key, tl.zeros([queries.shape[0], place.shape[0]], tl.float32)) * scale
    scores = tl.where(is_seen, scores, -float("inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    probability = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(highest - higher)
    weight = weight * shrink + tl.sum(probability, 1)
    value = tl.load(values + place[:, None] * entry.shape[0] + entry[None, :], mask=is_there[:, None], other=0.0)
    return higher, weight, dot(probability.to(value.dtype), value, total * shrink[:, None])


@triton.jit(do_not_specialize=["B", "T"])
def _attend(
    query, keys, values, slots, limits, own_firsts, own_ends, sums, weights, scale, B, T, capacity,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend for ROWS of the T * H / G rows that share a key head, over a part of the places that they see.

    The last part reads the places of their own too, if rows have any.

    With one part, sums is the output; with more, it takes sums [PARTS, B * T * H, E] whose weights, and the largest
    score behind them, go to weights [2, PARTS, B * T * H].
    """
    sequence, group, part = tl.program_id(1) // G, tl.program_id(1) % G, tl.program_id(2)
    row, entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    token, head = row // (H // G), group * (H // G) + row % (H // G)
    is_inside = token < T
    at = (sequence * T + token) * H + head
    follow(OVERLAP)
    limit = tl.load(limits + sequence * T + token, mask=is_inside, other=0)
    slab = (tl.load(slots + sequence) * G + group) * capacity * E
    queries = tl.load(query + at[:, None] * E + entry[None, :], mask=is_inside[:, None], other=0.0)
    count = tl.cdiv(tl.max(limit, 0), PLACES).to(tl.int32)
    per_part = tl.cdiv(count, PARTS)
    highest, weight = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, E], tl.float32)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, count)):
        place = tile * PLACES + tl.arange(0, PLACES)
        is_seen = place[None, :] < limit[:, None]
        highest, weight, total = _attend_tile(
            queries, keys + slab, values + slab, place, entry, is_seen, capacity, scale, highest, weight, total
        )
    if own_firsts is not None:
        first = tl.load(own_firsts + sequence * T + token, mask=is_inside, other=0)
        end = tl.load(own_ends + sequence * T + token, mask=is_inside, other=0)
        lowest = tl.min(tl.where(first < end, first, capacity), 0)
        own_count = tl.cdiv(tl.maximum(tl.max(end, 0) - lowest, 0), PLACES).to(tl.int32)
        for tile in range(0, tl.where(part == PARTS - 1, own_count, 0)):
            place = lowest + tile * PLACES + tl.arange(0, PLACES)
            is_seen = (place[None, :] >= first[:, None]) & (place[None, :] < end[:, None])
            highest, weight, total = _attend_tile(
                queries, keys + slab, values + slab, place, entry, is_seen, capacity, scale, highest, weight, total
            )
    if PARTS == 1:
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    else:
        sums += part * B * T * H * E
        tl.store(weights + part * B * T * H + at, highest, mask=is_inside)
        tl.store(weights + (PARTS + part) * B * T * H + at, weight, mask=is_inside)
    tl.store(sums + at[:, None] * E + entry[None, :], total.to(sums.dtype.element_ty), mask=is_inside[:, None])


@triton.jit(do_not_specialize=["R"])
def _merge_attention(
    sums, weights, out, R, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Write the weighted mean over the parts; a program takes one head of one row, R are all of them."""
    row, part, entry = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, E)
    is_part = part < PARTS
    follow(OVERLAP)
    highest = tl.load(weights + part * R + row, mask=is_part, other=LOWEST)
    scale = tl.exp2(highest - tl.max(highest, 0))
    weight = tl.sum(scale * tl.load(weights + (PARTS + part) * R + row, mask=is_part, other=0.0), 0)
    at = (part[:, None] * R + row) * E + entry[None, :]
    total = tl.sum(scale[:, None] * tl.load(sums + at, mask=is_part[:, None], other=0.0), 0)
    result = total / tl.where(weight > 0, weight, 1.0)
    tl.store(out + row * E + entry, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["R"])
def _head_tile(
    hidden, head, numbers, indices, banned, R, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of the vocabulary, for each row of hidden [R, C], to a best index and four numbers.

    These are numbers [4, R, tiles]: the best logit, the second, the sum of exp(logit - best), and the sum of
    (logit - best) * exp(logit - best).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight_row, tiles = tl.minimum(column, V - 1), tl.cdiv(C, DEPTH)
    logits = dot_tiles(hidden, head, tl.minimum(row, R - 1), weight_row, 0, tiles, C, DEPTH, OVERLAP, False, False)
    is_allowed = (column < V) & (column != banned)
    logits = tl.where(is_allowed[:, None], logits, -float("inf"))
    best = tl.max(logits, 0)
    index = tl.min(tl.where(logits == best[None, :], column[:, None], V), 0)
    second = tl.max(tl.where(column[:, None] == index[None, :], -float("inf"), logits), 0)
    below = tl.maximum(logits, LOWEST) - tl.maximum(best, LOWEST)[None, :]
    weight = tl.where(is_allowed[:, None], tl.exp(below), 0.0)
    count: tl.constexpr = tl.cdiv(V, COLUMNS)
    at, is_inside = row * count + tl.program_id(1), row < R
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
    follow(OVERLAP)
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
