"""How fast is a decode-time forward pass, and how are its kernels cut up best? For one H100; under 3 minutes.

    python benchmarks/decode_kernels.py
    TRITON_INTERPRET=1 python benchmarks/decode_kernels.py --shape tiny --rows '[1, 8]'    # the logic, on a CPU

First the products: for every number of rows and every matrix, a list of tiles is tried, under CUDA graphs, with
weights taken in turn from more copies than the L2 holds. What counts is the product with the kernel that adds up its
parts ("with reader": a norm, which stands in for the rotation too); cuBLAS stands beside it. Of the fastest, the whole
pass, head included, decides: one matrix after the other, then one setting of the other kernels after the other. Numbers
of rows that share tiles are judged together. The choice is printed in the form of `tiles.TILES`. Last, passes with
these tiles: kernels that wait for each other's end, kernels that overlap, and torch's own products.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product
from multiprocessing import get_context
from typing import Literal, NamedTuple

import shapes
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastdllm.cli import run
from fastdllm.decoding import operations
from fastdllm.decoding.cache import SlotCache
from fastdllm.decoding.fused import FusedForward
from fastdllm.decoding.kernels import Kernels
from fastdllm.decoding.operations import PassRows
from fastdllm.decoding.tiles import Settings, Tiles
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import device_name, pick_device

SHAPES = {**shapes.SHAPES, "tiny": (64, 128, 2, 4, 2, 272)}  # for the interpreter, a tiny vocabulary too
TRIED = {  # rows of a tile -> columns, depth, warps, stages
    16: [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 64, 4, 5), (128, 128, 8, 3)],
    32: [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 64, 4, 5), (128, 128, 8, 3)],
    64: [(64, 128, 4, 4), (64, 64, 4, 6), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)],
    128: [(64, 64, 4, 5), (128, 64, 8, 4), (128, 128, 8, 3)],
    256: [(128, 64, 8, 4)],
}
PROGRAMS = (132, 198, 264)  # aimed at by the parts that are tried
KEPT = 5  # tiles of each matrix, that the whole pass chooses from
ATTEND = [  # rows, places, programs, warps, stages
    (64, 64, 132, 4, 2), (64, 64, 264, 8, 2), (64, 64, 264, 4, 3), (64, 32, 264, 4, 3), (64, 128, 264, 8, 2),
    (64, 64, 264, 4, 2), (32, 64, 264, 4, 2), (32, 32, 264, 4, 3), (16, 64, 264, 4, 2),
]  # fmt: skip
ATTEND_FIELDS = [field for field in Settings._fields if field.startswith("attend_")]
SETTINGS_TRIED = [  # the first two are of kernels that depend on the parts of a product as well
    [dict(normalize_warps=warps) for warps in (4, 8, 16)],
    [dict(rotate_heads=heads) for heads in (2, 4)],
    [dict(zip(ATTEND_FIELDS, values, strict=True)) for values in ATTEND],
]
L2_BYTES = 50 * 2**20
MASK, SEED = 3, 0


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Measure the decode-time kernels."""

    shape: Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "tiny"] = "qwen2.5-1.5b"
    """Whose sizes."""
    rows: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    """Of a product; of a pass too, in sequences of 32 at most."""
    context: int = 512
    """Places that each row sees in the pass."""
    repeats: int = 10
    """Timed replays of a graph; the fastest counts."""
    seconds: float = 115.0
    """After them no other choice is tried; 25 more go to the last table."""


class Matrix(NamedTuple):
    """A weight matrix of a layer, or the head."""

    name: str
    N: int
    K: int
    is_gated: bool = False


class Way(NamedTuple):
    """How a pass is run."""

    tiles: dict[tuple[int, int, int], Tiles]
    settings: Settings = Settings()
    overlap: bool = False
    max_few_rows: int = 256


def measure(config: KernelsConfig) -> None:
    """Print the products, the other kernels and the whole pass."""
    device, started = pick_device(), time.perf_counter()
    print(device_name(device), torch.__version__, config, flush=True)
    C, inner, num_layers, H, G, V = SHAPES[config.shape]
    E = C // H
    matrices = [
        Matrix("query, key, value", (H + 2 * G) * E, C),
        Matrix("output", C, C),
        Matrix("gate, up", 2 * inner, C, is_gated=True),
        Matrix("down", C, inner),
        Matrix("head", V, C),
    ]
    groups = [tuple(rows) for _, rows in groupby(sorted(config.rows), lambda R: key(matrices[0], R)[0])]
    pool = ProcessPoolExecutor(max(1, min(14, os.cpu_count() - 2)), mp_context=get_context("spawn"))

    def compile_all(what: str, function: Callable, jobs: list) -> list:  # into Triton's cache on disk
        if device.type != "cuda":
            return jobs
        errors = list(pool.map(function, jobs, chunksize=1))
        for error in {error for error in errors if error is not None}:
            print(f"does not run: {error}", flush=True)
        print(f"{len(jobs)} {what} compiled, {time.perf_counter() - started:.0f} s", flush=True)
        return [job for job, error in zip(jobs, errors, strict=True) if error is None]

    jobs = {(m, t): (m, R, t) for m, R in product(matrices, config.rows) for t in tried_tiles(m, R, device)}
    slowest_first = sorted(jobs.values(), key=lambda job: -job[2].rows * job[2].columns)
    running = {(m, t) for m, _, t in compile_all("products", compile_product, slowest_first)}
    kept = {}
    for m in matrices:
        weights = make_weights(m, device)
        for rows in groups:
            times = [time_tiles(m, R, weights, running, config) for R in rows]
            kept[key(m, rows[0])] = keep({t: sum(time[t] for time in times) for t in times[0]})
        del weights
    best = {k: tiles[0] for k, tiles in kept.items()}
    ways = [Way({k: tiles[i % len(tiles)] for k, tiles in kept.items()}) for i in range(KEPT)]
    with_parts, others = ([{}, *sum(tried, [])] for tried in (SETTINGS_TRIED[:2], SETTINGS_TRIED[2:]))
    varied = [*product(ways, with_parts), *product(ways[:1], others)]
    varied = [way._replace(settings=way.settings._replace(**change)) for way, change in varied]
    compile_all("passes", compile_pass, [(R, config, way) for way, R in product(varied, config.rows)])
    passes, chosen = Passes(config, num_layers, device), {}
    for rows in groups:
        keys = [key(m, rows[0]) for m in matrices if m.name != "head"]
        left = config.seconds - (time.perf_counter() - started)
        share = left * len(rows) / sum(len(others) for others in groups if others not in chosen)
        chosen[rows] = choose(passes, rows, best, {k: kept[k] for k in keys}, time.perf_counter() + share)
        best |= {k: chosen[rows].tiles[k] for k in keys}
    print("TILES = {", *(f"    {k}: Tiles{tuple(t)}," for k, t in best.items()), "}", sep="\n", flush=True)
    jobs = [(R, config, chosen[rows]._replace(overlap=True)) for rows in groups for R in rows]
    compile_all("overlapping passes", compile_pass, jobs)
    pool.shutdown()
    for rows, way in chosen.items():
        for R in rows:
            print_table(passes, R, way)
    print(f"{time.perf_counter() - started:.0f} s in all")


def key(m: Matrix, R: int) -> tuple[int, int, int]:
    return max(16, 1 << (R - 1).bit_length()), m.N, m.K


def tried_tiles(m: Matrix, R: int, device: torch.device) -> list[Tiles]:
    """Return the tiles to try, without those that shared memory cannot hold."""
    rows = min(128, key(m, R)[0])
    whole = TRIED[256] if R > 128 and m.name != "head" else []  # the head's reductions would not fit into registers
    shapes = [(rows, *rest) for rest in TRIED[rows]] + [(256, *rest) for rest in whole]
    if device.type == "cpu":
        shapes = [(16, 32, 64, 4, 1)]
    tiles = set()
    for rows, columns, depth, warps, stages in shapes:
        if stages * depth * (rows + columns) * 2 > 220 * 1024:
            continue
        programs, steps = -(-m.N // columns) * -(-R // rows), -(-m.K // depth)
        for aim in PROGRAMS if not m.is_gated and m.name != "head" else (0,):
            in_part = -(-steps // max(1, min(16, round(aim / programs), steps)))
            tiles.add(Tiles(rows, columns, depth, -(-steps // in_part), warps, stages))
    return sorted(tiles)


def time_tiles(m: Matrix, R: int, weights: list, running: set, config: KernelsConfig) -> dict[Tiles, float]:
    """Return microseconds with reader of all tiles that run; print the fastest."""
    tried = [t for t in tried_tiles(m, R, weights[0].device) if (m, t) in running]
    times = {t: time_product(m, R, weights, Kernels({key(m, R): t}), config)[-1] for t in tried}
    fastest = sorted(times, key=times.get)
    ours = time_product(m, R, weights, Kernels({key(m, R): fastest[0]}), config, is_alone=True)
    report(m, R, [(times[t], t) for t in fastest], ours, time_product(m, R, weights, operations, config, is_alone=True))
    return times


def keep(times: dict[Tiles, float]) -> list[Tiles]:
    """Return the fastest tiles, the fastest first, and those of other parts before others of the same."""
    fastest, parts = sorted(times, key=times.get), []
    for tiles in fastest:
        parts += [] if tiles.parts in parts else [tiles.parts]
    varied = [next(tiles for tiles in fastest if tiles.parts == number) for number in parts][:3]
    kept = varied + [tiles for tiles in fastest if tiles not in varied]
    return sorted(kept[:KEPT], key=times.get)


def compile_product(job: tuple[Matrix, int, Tiles]) -> str | None:
    """Run the product once; return what went wrong, if anything did: one tile that fails must not end a session."""
    m, R, tiles = job
    weight = torch.zeros(m.N, m.K, dtype=torch.bfloat16, device="cuda")
    try:
        for call in product_calls(m, R, [weight], Kernels({key(m, R): tiles})):
            call[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def compile_pass(job: tuple[int, KernelsConfig, Way]) -> str | None:
    """Run the pass once, on a model of one layer; return what went wrong, if anything did."""
    R, config, way = job
    try:
        one_layer(config).call(way, R)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{way.settings}, {type(error).__name__}: {str(error)[:200]}"


def apply(kernels, m: Matrix, rows, weight):
    if m.name == "head":
        return kernels.head_statistics(rows, weight, MASK)
    return kernels.multiply_gated(rows, weight) if m.is_gated else kernels.multiply(rows, weight)


def make_weights(m: Matrix, device: torch.device) -> list[torch.Tensor]:
    """Return copies of the matrix that are together more than twice the L2."""
    copies = max(2, 2 * L2_BYTES // (2 * m.N * m.K) + 1) if device.type == "cuda" else 1
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (copies, m.N, m.K)
    weights = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(m.K**-0.5)
    return list(weights)


def time_product(m: Matrix, R: int, weights: list, kernels, config: KernelsConfig, is_alone=False) -> list[float]:
    """Return microseconds of the product, if asked for, and of it with the kernel that reads its parts, if any."""
    calls = product_calls(m, R, weights, kernels)
    return [microseconds(c, weights[0].device, config.repeats) for c in (calls if is_alone else calls[1:])]


def product_calls(m: Matrix, R: int, weights: list, kernels) -> tuple[list[Callable], list[Callable]]:
    rows = torch.randn(R, m.K, device=weights[0].device).to(torch.bfloat16)
    if kernels is operations and m.name == "head":
        calls = [lambda w=w: F.linear(rows, w) for w in weights]
    else:
        calls = [lambda w=w: apply(kernels, m, rows, w) for w in weights]
    if m.is_gated or m.name == "head":
        return calls, calls
    hidden, norm, few = rows.new_ones(R, m.N), rows.new_ones(m.N), Kernels()
    return calls, [lambda call=call: few.normalize(hidden, call(), norm, 1e-6) for call in calls]


def microseconds(calls: list[Callable], device: torch.device, repeats: int) -> float:
    """Return the time of one call, from a CUDA graph of all of them, at least 16; on a CPU, of one call as it is."""
    if device.type != "cuda":
        started = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - started)
    calls = calls * -(-16 // len(calls)) if len(calls) > 1 else calls
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return min(times[2:])


def report(m: Matrix, R: int, timed: list[tuple[float, Tiles]], ours: list[float], cublas: list[float]) -> None:
    """Print the fastest tiles beside cuBLAS, and how the others did."""
    speed = 2 * m.N * m.K / 1e6
    results = [
        f"{name} {alone:7.1f} us {speed / alone:5.2f} TB/s, with reader {both:7.1f} us"
        for name, (alone, both) in (("ours", ours), ("cuBLAS", cublas))
    ]
    print(f"{m.name:<17} {R:>4} rows  {' | '.join(results)} | {tuple(timed[0][1])}", flush=True)
    print(f"{'':<17} next: " + ", ".join(f"{both:.1f} {tuple(tiles)}" for both, tiles in timed[1:4]), flush=True)


class Passes:
    """A model of a shape, whose passes are run in several ways."""

    @torch.no_grad()
    def __init__(self, config: KernelsConfig, num_layers: int, device: torch.device):
        C, inner, _, H, G, V = SHAPES[config.shape]
        qwen_config = Qwen2Config(
            vocab_size=V, hidden_size=C, intermediate_size=inner, num_hidden_layers=num_layers, num_attention_heads=H,
            num_key_value_heads=G, tie_word_embeddings=True, max_position_embeddings=4096, dtype=torch.bfloat16,
        )  # fmt: skip
        with device:
            qwen = Qwen2ForCausalLM(qwen_config).to(torch.bfloat16)
        self.config, self.device, self.model = config, device, BlockDiffusionLM(qwen, mask_token_id=MASK)
        self.weight_bytes = 2 * sum(parameter.numel() for parameter in qwen.parameters())

    def fused(self, way: Way) -> FusedForward:
        kernels = Kernels(way.tiles, way.overlap, way.settings)
        return FusedForward(self.model, kernels, max_few_rows=way.max_few_rows)

    def inputs(self, R: int) -> tuple[torch.Tensor, PassRows, SlotCache]:
        """Return tokens, rows and cache of R rows, in sequences of 32 at most."""
        B, T, context = max(1, R // 32), min(R, 32), self.config.context
        tokens = torch.randint(0, self.model.qwen.config.vocab_size, (B, T), device=self.device)
        places = (context - T + torch.arange(T, device=self.device)).expand(B, T).contiguous()
        slots, limits = torch.arange(B, device=self.device), torch.full_like(places, context)
        return tokens, PassRows(places, places, slots, limits), SlotCache(self.model, B, context + 32)

    def call(self, way: Way, R: int) -> Callable:
        fused, inputs = self.fused(way), self.inputs(R)
        return lambda: fused.statistics(fused(*inputs).flatten(0, 1))

    def milliseconds(self, way: Way, R: int) -> float:
        """Return the time of a pass; infinity if it fails, for the others still count."""
        try:
            return microseconds([self.call(way, R)], self.device, self.config.repeats) / 1e3
        except Exception as error:
            print(f"fails: {R} rows, {way}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return float("inf")


@cache
def one_layer(config: KernelsConfig) -> Passes:
    return Passes(config, 1, torch.device("cuda"))


def choose(passes: Passes, rows: tuple[int, ...], best: dict, kept: dict[tuple, list[Tiles]], until: float) -> Way:
    """Return the fastest way to run passes of these rows that is found before `until`; print how it was found."""
    few = 1 if passes.device.type == "cpu" else None

    def improve(what: str, way: Way, moves: list[Callable]) -> Way:
        time_ms, num_left_out = cost(way), 0
        for move in moves:
            for other in range(len(move(way))):
                changed = move(way)[other]
                if time.perf_counter() > until:
                    num_left_out += 1
                    continue
                changed_ms = time_ms if changed == way else cost(changed)
                if changed_ms < 0.998 * time_ms:  # less is noise
                    way, time_ms = changed, changed_ms
        left_out = f", {num_left_out} not tried: time is over" if num_left_out else ""
        print(f"{rows} rows: {time_ms:.3f} ms by {what}{left_out}", flush=True)
        return way

    def cost(way: Way) -> float:
        return sum(passes.milliseconds(way, R) for R in rows)

    tiles = [lambda way, k=k: [way._replace(tiles={**way.tiles, k: t}) for t in kept[k]] for k in kept]
    settings = [
        lambda way, c=changes: [way._replace(settings=way.settings._replace(**change)) for change in c[:few]]
        for changes in SETTINGS_TRIED
    ]
    way = Way(best)
    print(f"{rows} rows: {cost(way):.3f} ms with the products chosen one by one", flush=True)
    way = improve("settings", improve("tiles", way, tiles), settings)
    print(f"    {way.settings}", flush=True)
    return way


def print_table(passes: Passes, R: int, way: Way) -> None:
    """Print a layer's other kernels and the whole pass of R rows, in each way."""
    time_small_kernels(R, passes, way)
    ways = {"ours": way, "overlapping": way._replace(overlap=True), "torch's products": way._replace(max_few_rows=0)}
    if passes.device.type != "cuda":
        del ways["overlapping"]
    for name, each in ways.items():
        time_ms = passes.milliseconds(each, R)
        speed = passes.weight_bytes / time_ms / 1e9
        print(f"pass of {R:>3} rows, {name:<16} {time_ms:6.3f} ms, {speed:5.2f} TB/s", flush=True)


@torch.no_grad()
def time_small_kernels(R: int, passes: Passes, way: Way) -> None:
    """Print the microseconds of the kernels between the products; what they read is in the L2, as in a pass."""
    fused, (_, rows, cache) = passes.fused(way), passes.inputs(R)
    kernels, layer = fused.kernels, fused._layers[0]
    keys, values, device = cache.keys[0], cache.values[0], cache.keys.device
    hidden = torch.randn(R, layer.output.shape[0], device=device).to(torch.bfloat16)
    parts = kernels.multiply(hidden, layer.query_key_value)
    added = kernels.multiply(hidden, layer.output)
    arguments = (parts, layer.query_key_value_bias, fused._angles, rows, keys, values)
    query = kernels.rotate_and_store(*arguments)
    calls = {
        "normalize": lambda: kernels.normalize(hidden, added, layer.input_norm, 1e-6),
        "rotate_and_store": lambda: kernels.rotate_and_store(*arguments),
        "attend_slots": lambda: kernels.attend_slots(query, keys, values, rows),
    }
    times = {name: microseconds([call] * 16, device, passes.config.repeats) for name, call in calls.items()}
    print(f"{R} rows: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()), flush=True)


if __name__ == "__main__":
    run(KernelsConfig, measure)
