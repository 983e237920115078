"""What only a GPU can show: FlexAttention in compiled training equals the dense form; the engine equals the CPU's."""

import pytest
import torch
from conftest import make_qwen
from decoding.test_engine import make_model, make_prompts
from torch.testing import assert_close

from fastdllm import objective
from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.policies import DEFAULT_THRESHOLD
from fastdllm.decoding.record import record
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.draft import DraftConfig, draw_anchors
from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.drafting import DraftPass
from fastdllm.training.module import TrainingPass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
L, D, MASK = 128, 32, 259


def make_batch(seed):
    """Two samples of places for 2 L tokens: two short documents with prompts; one document."""
    generator = torch.Generator().manual_seed(seed)
    noise = [objective.draw_noise(seed, index, 2 * L, D) for index in range(2)]
    place = torch.arange(2 * L)
    document = torch.stack([(place < 64) + 2 * ((place >= 64) & (place < 128)), (place < 128).long()])
    position = torch.stack([place % 64, place])
    return dict(
        tokens=torch.randint(0, 256, (2, 2 * L), generator=generator),
        document=document,
        position=position,
        is_response=(document > 0) & (position > 20),
        noise_level=torch.stack([level for level, _ in noise]),
        is_masked_first=torch.stack([masked for _, masked in noise]),
    )


OBJECTIVES = [
    ObjectiveConfig(),
    ObjectiveConfig(first_token="clean"),
    ObjectiveConfig(context_attention="causal", ar_loss_weight=0.3),
    ObjectiveConfig(drop_dead_rows=False),
    ObjectiveConfig(kind="autoregressive"),
]


@pytest.mark.parametrize(
    ("config", "recompute"),
    [*((config, "selective") for config in OBJECTIVES), *((OBJECTIVES[0], r) for r in ("none", "full"))],
)
def test_compiled_flex_training_equals_dense_training_without_recompiling(config, recompute):
    torch._dynamo.reset()  # the graphs of the other cases would count towards the limit
    cpu, gpu = (make_scoring(config) for _ in range(2))
    gpu.cuda()
    gpu.model.use_training_form(recompute, is_compiled=True)
    counters = torch._dynamo.utils.counters["stats"]
    for seed in range(4):
        if seed == 2:
            num_graphs = counters["unique_graphs"]
        results = []
        for scoring, device in ((cpu, "cpu"), (gpu, "cuda")):
            batch = {name: tensor.to(device) for name, tensor in make_batch(seed).items()}
            if config.kind == "autoregressive" or not config.drop_dead_rows:
                batch = {name: tensor[:, : tensor.shape[1] // 2] for name, tensor in batch.items()}
            scores = scoring(batch)
            layers = scoring.model.qwen.model.layers
            weights = [
                layers[0].self_attn.k_proj.weight,
                layers[1].mlp.up_proj.weight,
                scoring.model.qwen.lm_head.weight,
            ]
            gradients = torch.autograd.grad(scores.total, weights)
            results.append([tensor.detach().cpu() for tensor in (scores.loss, *gradients)])
        for expected, ours in zip(*results, strict=True):
            # TF32 products inside the flex kernel: three decimal digits
            assert_close(ours, expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)
    assert counters["unique_graphs"] == num_graphs


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_flex_drafting_equals_dense_drafting_without_recompiling(recompute):
    cpu, gpu = (make_drafting() for _ in range(2))
    gpu.cuda()
    gpu.use_training_form(recompute, is_compiled=True)
    counters = torch._dynamo.utils.counters["stats"]
    for seed in range(4):
        if seed == 2:
            num_graphs = counters["unique_graphs"]
        results, batch = [], make_batch(seed)
        anchors = [draw_anchors(seed, row, batch["is_response"][row], batch["document"][row], 16) for row in range(2)]
        for drafting, device in ((cpu, "cpu"), (gpu, "cuda")):
            inputs = {name: tensor.to(device) for name, tensor in (batch | {"anchor": torch.stack(anchors)}).items()}
            scores = drafting(inputs)
            gradients = torch.autograd.grad(scores.total, list(adapter_weights(drafting.model).values()))
            results.append([tensor.detach().cpu() for tensor in (scores.loss, *gradients)])
        for expected, ours in zip(*results, strict=True):
            # TF32 products inside the flex kernel: three decimal digits
            assert_close(ours, expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)
    assert counters["unique_graphs"] == num_graphs


def make_drafting():
    qwen = make_qwen(hidden_size=128, intermediate_size=128)
    model = BlockDiffusionLM(qwen, block_size=D, mask_token_id=MASK, context_attention="causal")
    add_adapter(model, AdapterSettings(rank=8), seed=0)
    for weight in adapter_weights(model).values():
        if not weight.any():
            weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return DraftPass(model, DraftConfig(window=16))


def make_scoring(config):
    qwen = make_qwen(hidden_size=128, intermediate_size=128)
    model = BlockDiffusionLM(qwen, block_size=D, mask_token_id=MASK, context_attention=config.context_attention)
    return TrainingPass(model, config, L)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {},
        {"free_rows": 0},
        {"reuse": ReuseConfig(reuse_k=2)},
        {"reuse": ReuseConfig(reuse_k=2, reuse_mode="delta")},
        {"reuse": ReuseConfig(schedule="adaptive", reuse_mode="delta", budget=0.3, subset="last")},
        {"reuse": ReuseConfig(active_rows="needed")},
        {"decode": {"fuse_append": True}},
        {"decode": {"temperature": 0.8}},
        {"decode": {"policy": "verified", "threshold": DEFAULT_THRESHOLD, "draft_length": 5}, "context": "causal"},
        {
            "decode": {"policy": "verified", "threshold": DEFAULT_THRESHOLD, "draft_groups": "0,3", "temperature": 0.8},
            "context": "causal",
        },
        {"decode": {"policy": "profile", "threshold": DEFAULT_THRESHOLD}},
    ],
)
@pytest.mark.parametrize("is_fused", [False, True])
def test_graphs_give_the_tokens_and_counts_of_eager_passes_on_the_cpu_in_float32(byte_tokenizer, options, is_fused):
    torch.backends.cuda.matmul.allow_tf32 = False
    requests = [Request(prompt=prompt, max_new_tokens=30) for prompt in make_prompts((1, 7, 8, 21, 40, 64))]
    decode = DecodeConfig(**{"threshold": 0.4, "sub_block_size": 4} | options.get("decode", {}))
    answers = []
    for device in ("cpu", "cuda"):
        context = options.get("context", "block")
        model, is_cuda = make_model(hidden_size=64, context=context).to(device), device == "cuda"
        settings = {"batch_size": 3, "free_rows": 256, "is_graphed": is_cuda, "is_fused": is_cuda and is_fused}
        settings |= {name: value for name, value in options.items() if name != "context"} | {"decode": decode}
        engine = Engine(model, byte_tokenizer, **settings)
        answers.append(sorted(engine.run(requests), key=lambda completion: completion.index))
        assert (engine.capture_seconds > 0) == (device == "cuda")
    assert answers[0] == answers[1]


@pytest.mark.parametrize("options", [{"mode": "ar"}, {}, {"reuse": ReuseConfig(reuse_k=2)}], ids=str)
def test_a_trace_timed_with_graphs_has_the_steps_of_the_cpu_s(byte_tokenizer, options):
    torch.backends.cuda.matmul.allow_tf32 = False
    request = Request(prompt=make_prompts((21,))[0], max_new_tokens=30)
    options = {"mode": "diffusion", "decode": DecodeConfig(threshold=0.4, sub_block_size=4)} | options
    steps = []
    for device in ("cpu", "cuda"):
        _, found, timing = record(make_model(hidden_size=64).to(device), byte_tokenizer, request, **options)
        steps.append([[(token.place, token.token) for token in step.tokens] for step in found])
        ends = [step.seconds for step in found]
        assert timing == "undisturbed" and ends == sorted(set(ends))
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar"},
        {},
        {"reuse": ReuseConfig(reuse_k=2)},
        {"decode": DecodeConfig(policy="verified", draft_length=3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [2, 9])  # with and without a host that lags behind
def test_a_session_with_graphs_keeps_turns_and_drops_rows_as_the_cpu_does(byte_tokenizer, options, batch_size):
    torch.backends.cuda.matmul.allow_tf32 = False
    options, turns = {"mode": "diffusion", "decode": DecodeConfig(threshold=0.4, sub_block_size=4)} | options, []
    for device in ("cpu", "cuda"):
        model = make_model(hidden_size=64, context="causal").to(device)
        engine = Engine(model, byte_tokenizer, batch_size=batch_size, free_rows=64, **options)
        history, long, found = make_prompts((30,))[0], Request(prompt=make_prompts((20,), 1)[0], max_new_tokens=60), []
        with engine.open(160) as session:
            for turn in range(3):
                row = session.submit(Request(prompt=history, max_new_tokens=20), is_watched=True)
                dropped = session.submit(long)
                for _ in range(3):
                    session.round()
                session.drop(dropped)
                while session.has_work:
                    session.round()
                found.append((row.tokens, row.cached_tokens))
                history = history + row.tokens + [turn]
        turns.append(found)
    assert turns[0] == turns[1] and turns[0][-1][1] > 48


def test_replays_do_not_need_scratch_memory_that_torch_gives_back(byte_tokenizer):
    model = make_model(hidden_size=512).to("cuda", torch.bfloat16)
    requests = [Request(prompt=prompt, max_new_tokens=60) for prompt in make_prompts((40, 64) * 8)]
    first, second = (Engine(model, byte_tokenizer, batch_size=16, is_fused=False) for _ in range(2))
    answers = [sorted(engine.run(requests), key=lambda completion: completion.index) for engine in (first, second)]
    first.free()
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do
    torch.cuda.empty_cache()
    answers.append(sorted(second.run(requests), key=lambda completion: completion.index))
    torch.cuda.synchronize()
    assert answers[0] == answers[1] == answers[2]


def test_half_precision_loss_head_equals_float64_with_both_gradients():
    torch.manual_seed(0)
    hidden = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (0.1 * torch.randn(1000, 64, device="cuda")).requires_grad_()
    token, weight = torch.randint(0, 1000, (256,), device="cuda"), torch.rand(256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        total, _, _ = objective.token_losses(hidden, head, token, weight)
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, head)]
    losses = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, token, reduction="none")
    theirs = torch.autograd.grad((losses * weight).sum(), exact)
    for ours, expected in zip(torch.autograd.grad(total, (hidden, head)), theirs, strict=True):
        assert_close(ours.double(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)
