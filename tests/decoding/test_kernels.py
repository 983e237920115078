"""Triton's kernels against their plain torch forms: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/decoding/test_kernels.py

Where Triton is installed, the suite starts this command itself, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from decoding.test_engine import make_prompts
from decoding.test_fused import MASK, check_pass, make_cache, make_model, make_rows, run_both
from decoding.test_updates import check_adapted, check_clean_rows, make_adapted
from decoding.test_verify import answers, make_engine, make_requests
from fastdllm.adapter import TARGETS
from fastdllm.decoding import operations
from fastdllm.decoding.fused import FusedForward
from fastdllm.decoding.operations import PassRows

triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch for GPUs")
from fastdllm.decoding import kernels as source  # noqa: E402
from fastdllm.decoding import products  # noqa: E402
from fastdllm.decoding.kernels import Kernels  # noqa: E402
from fastdllm.decoding.tiles import Settings, Tiles  # noqa: E402
from fastdllm.decoding.updates import LowRankUpdate  # noqa: E402

tl = triton.language
IS_INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if IS_INTERPRETED else "cuda"


@triton.jit
def count_from_first(first, out):
    for step in range(tl.load(first), 3):
        tl.store(out, step)


def missing():
    """Return why the kernels cannot run here, or None."""
    if not IS_INTERPRETED:
        return None if torch.cuda.is_available() else "needs a GPU, or TRITON_INTERPRET=1"
    try:
        count_from_first[(1,)](*torch.zeros(2, dtype=torch.int32).split(1))
    except triton.runtime.errors.InterpreterError as error:  # Triton 3.6 with numpy 2.4
        return f"Triton's interpreter fails on a loop: {error}"
    return None


MISSING = missing()
# Sums in another order; and in half precision, whose last bit is 2^-8 in bfloat16 and 2^-11 in float16, a kernel rounds
# less often than plain torch does.
TOLERANCE = {
    torch.float32: dict(atol=2e-5, rtol=2e-5),
    torch.bfloat16: dict(atol=4e-2, rtol=2e-2),
    torch.float16: dict(atol=4e-2 / 8, rtol=2e-2 / 8),
}
DTYPES = list(TOLERANCE)


def kernels_on(test):
    """Mark a test of the kernels: skipped where they cannot run, and `gpu` on a real device."""
    test = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))(test)
    return test if IS_INTERPRETED else pytest.mark.gpu(test)


def overlaps():
    """Kernels that start before the one before has ended are a matter of Hopper GPUs."""
    is_hopper = not IS_INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return [False, True] if is_hopper else [False]


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
@pytest.mark.slow
def test_the_kernels_equal_plain_torch_in_tritons_interpreter():
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-2])


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", overlaps())
@pytest.mark.parametrize(
    ("R", "N", "K", "tiles"),
    [
        (1, 96, 128, None),
        (5, 100, 640, None),  # the last tile of columns is not full
        (19, 64, 200, Tiles(16, 32, 64, 3)),  # nor the last rows, nor the last step of K
        (40, 64, 256, Tiles(32, 64, 64, 8)),  # some parts have nothing to do
    ],
)
def test_products_equal_plain_ones(R, N, K, tiles, dtype, overlap):
    rows, weight = draw(R, K, dtype=dtype), draw(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    key = (max(16, triton.next_power_of_2(R)), N, K)
    kernels = Kernels({} if tiles is None else {key: tiles}, overlap)
    parts = kernels.multiply(rows, weight)
    assert tiles is None or dtype == torch.float32 or len(parts) == tiles.parts
    expected = operations.multiply(rows, weight).sum(0)
    assert_close(parts.sum(0), expected.float(), **TOLERANCE[dtype])
    gated = kernels.multiply_gated(rows, weight)
    assert_close(gated, operations.multiply_gated(rows, weight), **TOLERANCE[dtype])


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("starts_early", [False, True])
def test_products_compile_for_hopper_where_no_gpu_is_needed(starts_early):
    tiles = dict(ROWS=32, COLUMNS=64, DEPTH=64, OVERLAP=True)
    product = dict(N=128, K=256, PARTS=2, GATED=False, EARLY=False, LATE=False, **tiles)
    section = dict(RANK=1, SECTIONS=1, REDUCED_PARTS=1, FIRST_END=128, SECOND_END=128)
    without = product | section | dict.fromkeys(("reduced", "expand", "gate"))
    without["EARLY"] = starts_early
    reducing = compile_for_hopper(products.multiply, ["*bf16", "*bf16", "*fp32", "i32"], without)
    assert order(reducing)[0] == "wait"
    assert order(reducing) == ["wait", "launch", "loop"] or not starts_early  # the next reads what this one waited for
    update = dict(RANK=64, SECTIONS=3, REDUCED_PARTS=5, FIRST_END=64, SECOND_END=96, LATE=starts_early)
    types = ["*bf16", "*bf16", "*fp32", "*bf16", "*i8"]
    updated = compile_for_hopper(products.multiply, [*types, "*fp32", "i32"], product | update)
    # the second loop is the update's; text behind a branch is in no order, so of the other form only its beginning
    assert order(updated) == ["loop", "launch", "wait", "loop"] if starts_early else order(updated)[0] == "wait"
    compile_for_hopper(products.multiply, [*types, "*bf16", "i32"], product | update | dict(GATED=True, SECTIONS=2))
    numbers = ["*fp32", "*i32", "i32", "i32"]
    compile_for_hopper(source._head_tile, ["*bf16", "*bf16", *numbers], dict(V=200, C=256, **tiles))


def compile_for_hopper(kernel, types, sizes):
    """Compile the kernel to PTX for arguments of these types, in order; what has no type has a size."""
    names, types = kernel.arg_names, iter(types)
    signature = {name: "constexpr" if name in sizes else next(types) for name in names}
    constants = {(names.index(name),): value for name, value in sizes.items()}
    program = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(program, target=target, options=dict(num_warps=4, num_stages=3)).asm["ptx"]
    assert "wgmma" in ptx
    return ptx


def order(ptx):
    """In which order PTX waits for the kernel before, lets the next one start, and multiplies."""
    names = {"griddepcontrol.wait": "wait", "griddepcontrol.launch_dependents": "launch", "wgmma.mma_async": "loop"}
    found = [name for line in ptx.splitlines() for code, name in names.items() if code in line]
    return [name for number, name in enumerate(found) if name != found[number - 1] or number == 0]


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", overlaps())
@pytest.mark.parametrize(
    ("R", "ends", "K", "rank", "tiles"),
    [
        (5, (128,), 200, 3, None),
        (5, (48, 96), 2200, 64, Tiles(16, 32, 128, 3)),  # the reducing product has two parts
        (40, (60, 72, 100), 256, 70, Tiles(32, 64, 64, 8)),  # columns of three sections, a rank of two steps
    ],
)
def test_updates_of_products_equal_plain_ones(R, ends, K, rank, tiles, overlap, dtype):
    N, rows = ends[-1], draw(R, K, dtype=dtype)
    weight = draw(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    reduce = draw(len(ends) * rank, K, dtype=dtype, seed=2, scale=K**-0.5)
    expand = draw(N, rank, dtype=dtype, seed=3, scale=rank**-0.5)
    gate = (torch.arange(R) % 3 == 1)[:, None].to(DEVICE)
    update = LowRankUpdate(reduce, expand, ends, gate)
    kernels = Kernels({} if tiles is None else {(max(16, triton.next_power_of_2(R)), N, K): tiles}, overlap)
    found, plain = kernels.multiply(rows, weight, update), kernels.multiply(rows, weight)
    assert_close(found.sum(0), operations.multiply(rows, weight, update).sum(0).float(), **TOLERANCE[dtype])
    is_clean = ~gate[:, 0]
    assert torch.equal(found[:, is_clean], plain[:, is_clean]) and not torch.equal(found, plain)
    if len(ends) != 2:
        return
    found, plain = kernels.multiply_gated(rows, weight, update), kernels.multiply_gated(rows, weight)
    assert_close(found, operations.multiply_gated(rows, weight, update), **TOLERANCE[dtype])
    assert torch.equal(found[is_clean], plain[is_clean]) and not torch.equal(found, plain)


@kernels_on
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it():
    rows, weight = draw(16, 256, dtype=torch.bfloat16), draw(96, 256, dtype=torch.bfloat16, seed=1)
    kernels = Kernels({(16, 96, 256): Tiles(16, 64, 64, 4)})
    alone = torch.cat([kernels.multiply(rows[i : i + 1], weight) for i in range(16)], dim=1)
    assert torch.equal(alone, kernels.multiply(rows, weight))


@kernels_on
def test_small_kernels_cut_up_in_another_way_give_the_same_pass():
    model, settings = make_model(DEVICE), Settings(8, 4, 32, 16, 64, 8, 3, 64, 32, False)
    check_pass(model, FusedForward(model, Kernels(settings=settings)), 3, 8, atol=1e-4, rtol=1e-4)
    adapted = make_adapted(["down_proj"], device=DEVICE)
    check_adapted(adapted, FusedForward(adapted, Kernels(settings=settings)), 2, 3, atol=1e-4, rtol=1e-4)


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [None, 1, 3])
def test_norms_with_a_sum_equal_plain_ones(num_parts, dtype):
    hidden, weight = draw(5, 48, dtype=dtype), draw(48, dtype=dtype, seed=1)
    parts = None if num_parts is None else draw(num_parts, 5, 48, seed=2)
    ours = Kernels().normalize(hidden, parts, weight, 1e-6)
    for found, expected in zip(ours, operations.normalize(hidden, parts, weight, 1e-6), strict=True):
        assert_close(found, expected, **TOLERANCE[dtype])


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "E", "num_parts"), [(4, 2, 16, 1), (6, 1, 32, 3)])
def test_turned_heads_and_what_is_stored_equal_plain_ones(H, G, E, num_parts, dtype):
    B, T = 3, 4
    _, *rows = make_rows(B, T, device=DEVICE)
    parts, bias = draw(num_parts, B * T, (H + 2 * G) * E), draw((H + 2 * G) * E, dtype=dtype, seed=1)
    angle = 500 * draw(500, E // 2, seed=2)
    arguments = (parts, bias, torch.stack([angle.cos(), angle.sin()]), PassRows(*rows))
    ours, plain = ([draw(5, G, 41, E, dtype=dtype, seed=seed) for seed in (3, 4)] for _ in range(2))
    query = Kernels().rotate_and_store(*arguments, *ours)
    assert_close(query, operations.rotate_and_store(*arguments, *plain), **TOLERANCE[dtype])
    for found, expected in zip(ours, plain, strict=True):
        assert_close(found, expected, **TOLERANCE[dtype])


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "capacity"), [(1, 1, 4, 2, 40), (2, 7, 6, 2, 200), (3, 24, 3, 1, 130), (70, 1, 8, 4, 70)]
)
def test_attention_in_slots_equals_plain_attention(B, T, H, G, capacity, dtype):
    generator = torch.Generator().manual_seed(0)
    query = draw(B, T, H, 16, dtype=dtype)
    keys, values = (draw(B + 2, G, capacity, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    slots = torch.randperm(B + 2, generator=generator)[:B].to(DEVICE)
    limits = torch.randint(0, capacity + 1, (B, T), generator=generator)
    limits[0, 0] = capacity
    limits[-1, -1] = 0 if B * T > 1 else capacity
    limits = limits.to(DEVICE)
    rows = rows_that_see(slots, limits)
    found = Kernels().attend_slots(query, keys, values, rows)
    assert_close(found, operations.attend_slots(query, keys, values, rows), **TOLERANCE[dtype])
    assert bool((found[limits == 0] == 0).all())


def rows_that_see(slots, limits, *own):
    return PassRows(limits, limits, slots, limits, *own)  # positions and places do not matter to attention


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "K", "groups", "H", "G"), [(1, 4, 5, 4, 2), (2, 3, 1, 6, 2), (3, 16, 3, 4, 1), (70, 2, 3, 4, 2)]
)
@pytest.mark.parametrize("places", [16, 128])
def test_rows_with_places_of_their_own_see_them_too(B, K, groups, H, G, places, dtype):
    generator = torch.Generator().manual_seed(0)
    T, capacity, scratch = 1 + K + groups * K, 150, groups * K
    query = draw(B, T, H, 16, dtype=dtype)
    keys, values = (draw(B, G, capacity + scratch + 1, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    limits = torch.randint(0, capacity + 1, (B, T), generator=generator)
    limits[0, -1] = 0  # sees its group alone
    first = torch.cat([torch.zeros(1 + K, dtype=torch.int64), capacity + torch.arange(scratch) // K * K])
    end = torch.where(first > 0, first + K, 0)
    own = (tensor.expand(B, -1).contiguous().to(DEVICE) for tensor in (first, end))
    rows = rows_that_see(torch.arange(B, device=DEVICE), limits.to(DEVICE), *own)
    found = Kernels(settings=Settings(attend_places=places)).attend_slots(query, keys, values, rows)
    assert_close(found, operations.attend_slots(query, keys, values, rows), **TOLERANCE[dtype])
    alone = values[0, :, capacity + scratch - K : capacity + scratch].float().mean(1)  # equal weights, to compare with
    query[0, -1] = 0.0
    found = Kernels().attend_slots(query, keys, values, rows)[0, -1].view(G, H // G, 16).float()
    assert_close(found, alone[:, None].expand_as(found), **TOLERANCE[dtype])


@kernels_on
@pytest.mark.parametrize("E", [8, 24])
def test_a_head_size_without_tiles_is_refused(E):
    slots, limits = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"head size of 16, 32, 64, ..., got {E}"):
        Kernels().attend_slots(draw(1, 1, 2, E), draw(1, 1, 4, E), draw(1, 1, 4, E), rows_that_see(slots, limits))


@kernels_on
def test_large_scores_do_not_overflow():
    query, limits = draw(1, 2, 4, 16, scale=200.0), torch.full((1, 2), 200, device=DEVICE)
    keys, values = (draw(1, 2, 200, 16, seed=seed) for seed in (1, 2))
    arguments = (query, keys, values, rows_that_see(torch.zeros(1, dtype=torch.int64, device=DEVICE), limits))
    assert_close(Kernels().attend_slots(*arguments), operations.attend_slots(*arguments), atol=1e-3, rtol=1e-3)


@kernels_on
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "V", "C"), [(1, 70, 64), (5, 300, 96), (20, 129, 64)])
def test_statistics_of_the_head_equal_plain_ones(R, V, C, dtype):
    hidden, head = draw(R, C), draw(V, C, seed=1, scale=0.5)
    banned = int((hidden @ head.T)[0].argmax())  # the first row's best token
    hidden, head = hidden.to(dtype), head.to(dtype)
    # the kernel does not round its logits, so plain ones must not be either
    expected = operations.head_statistics(hidden.float(), head.float(), banned)
    found = Kernels().head_statistics(hidden, head, banned)
    assert torch.equal(found.best, expected.best) and banned not in found.best
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@kernels_on
def test_the_lowest_of_equal_tokens_wins_and_is_second_too():
    head = torch.zeros(200, 64, device=DEVICE)
    head[[3, 9, 70, 150], 0] = 1.0  # in one tile and in others
    hidden = torch.zeros(2, 64, device=DEVICE)
    hidden[:, 0] = 1.0
    for banned, expected in ((199, 3), (3, 9)):
        found = Kernels().head_statistics(hidden, head, banned)
        assert found.best.tolist() == [expected] * 2
        assert found.best_logit.tolist() == found.second_logit.tolist() == [1.0] * 2


@kernels_on
@pytest.mark.parametrize(("B", "T", "max_few_rows"), [(3, 8, 256), (2, 3, 4)])
@pytest.mark.parametrize("overlap", overlaps())
def test_a_fused_pass_with_kernels_equals_the_models(B, T, max_few_rows, overlap):
    model = make_model(DEVICE)
    fused = FusedForward(model, Kernels(overlap=overlap), max_few_rows=max_few_rows)
    check_pass(model, fused, B, T, atol=1e-4, rtol=1e-4)


@kernels_on
@pytest.mark.parametrize("targets", [TARGETS, ["v_proj", "gate_proj", "down_proj"]])
@pytest.mark.parametrize("overlap", overlaps())
def test_a_fused_pass_with_an_adapter_and_kernels_equals_the_models(targets, overlap):
    model = make_adapted(targets, rank=5, device=DEVICE)
    check_adapted(model, FusedForward(model, Kernels(overlap=overlap)), 3, 8, atol=1e-4, rtol=1e-4)


@kernels_on
@pytest.mark.parametrize("overlap", overlaps())
def test_clean_rows_of_a_pass_with_an_adapter_are_those_without_it_to_the_bit(overlap):
    check_clean_rows(Kernels(overlap=overlap), torch.bfloat16, DEVICE)


@kernels_on
@pytest.mark.skipif(IS_INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("draft_length", [0, 4, 16])  # of 16, all groups are too many rows for the kernels
def test_an_engine_with_an_adapter_answers_from_cuda_graphs_what_plain_layers_answer(byte_tokenizer, draft_length):
    requests = make_requests(make_prompts((1, 5, 8, 12, 21)))
    expected = answers(make_engine(make_model(), byte_tokenizer, 5, mode="ar"), requests)
    model = make_adapted(device=DEVICE)
    for batch_size in (1, 3):
        engine = make_engine(model, byte_tokenizer, batch_size, draft_length=draft_length)
        assert engine.is_fused and engine.is_graphed
        assert [one.tokens for one in answers(engine, requests)] == [one.tokens for one in expected]


@kernels_on
def test_a_fused_pass_in_half_precision_is_as_near_to_float32_as_the_models():
    exact, half = make_model(DEVICE), make_model(DEVICE).to(torch.bfloat16)
    _, expected = run_both(exact, FusedForward(exact), 2, 4)
    ours, theirs = run_both(half, FusedForward(half, Kernels()), 2, 4)
    allowed = 3 if IS_INTERPRETED else 1.2  # the interpreter cuts off where a GPU rounds
    for mine, its, truth in zip(ours, theirs, expected, strict=True):
        assert (mine.float() - truth).norm() <= allowed * (its.float() - truth).norm()


@kernels_on
@pytest.mark.skipif(IS_INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("overlap", overlaps())
@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_captured_pass_repeats_an_eager_one_bit_for_bit(overlap, is_adapted):
    model = make_adapted(device=DEVICE, dtype=torch.bfloat16) if is_adapted else make_model(DEVICE).to(torch.bfloat16)
    fused, cache = FusedForward(model, Kernels(overlap=overlap)), make_cache(model)
    tokens, *rows = make_rows(2, 8, device=DEVICE)

    def run():
        hidden = fused(tokens, PassRows(*rows), cache).flatten(0, 1)
        return hidden, *fused.statistics(hidden)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(1, 4):
        for tensor, fresh in zip((tokens, *rows), make_rows(2, 8, seed, DEVICE), strict=True):
            tensor.copy_(fresh)
        tokens[:, seed::3] = MASK  # whose rows an adapter updates
        expected = [tensor.clone() for tensor in run()]
        graph.replay()
        for found, eager in zip(captured, expected, strict=True):
            assert torch.equal(found, eager)
