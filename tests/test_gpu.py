"""What only a GPU can show: FlexAttention in compiled training equals the dense form; the engine equals the CPU's."""

import pytest
import torch
from conftest import make_qwen
from decoding.test_engine import make_model, make_prompts, run
from torch.testing import assert_close

from fastdllm import objective
from fastdllm.masks import dense_attention_mask, training_attention
from fastdllm.model import BlockDiffusionLM
from fastdllm.objective import ObjectiveConfig
from fastdllm.training.module import TrainingPass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
L, D, MASK = 128, 32, 259


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = [objective.draw_noise(seed, index, L, D) for index in range(2)]
    position = torch.cat([torch.arange(64), torch.arange(64)]).expand(2, -1)
    batch = dict(
        tokens=torch.randint(0, 256, (2, L), generator=generator),
        document=torch.tensor([[1] * 64 + [2] * 64, [1] * 64 + [0] * 64]),
        position=position,
        is_response=(position > 20) & (torch.tensor([[2], [1]]) * 64 > torch.arange(L)),
        noise_level=torch.stack([level for level, _ in noise]),
        is_masked_first=torch.stack([masked for _, masked in noise]),
    )
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("config", [ObjectiveConfig(), ObjectiveConfig(context_attention="causal", ar_loss_weight=0.3)])
def test_compiled_flex_training_equals_dense_training_without_recompiling(config):
    qwen = make_qwen(hidden_size=128, intermediate_size=128).cuda()
    model = BlockDiffusionLM(qwen, block_size=D, mask_token_id=MASK, context_attention=config.context_attention)
    scoring = TrainingPass(model, config)
    weight = qwen.model.layers[0].self_attn.k_proj.weight
    for layer in qwen.model.layers:
        layer.compile(dynamic=False)
    for seed in range(4):
        batch = make_batch(seed)
        if seed == 2:  # the second batch may still specialise; from the third on nothing may compile
            torch._dynamo.utils.counters.clear()
        scores = scoring(batch)
        (gradient,) = torch.autograd.grad(scores.loss.sum(), weight)
        with torch.compiler.set_stance("force_eager"):
            tokens, rows, targets = objective.block_diffusion_inputs(batch, config, MASK)
            predicate = training_attention(rows, D, config.context_attention)
            hidden = model.hidden_states(
                tokens, rows.position, dense_attention_mask(predicate, *tokens.shape, tokens.device)
            )
            loss, _ = objective.token_losses(hidden.flatten(0, 1)[targets.row], qwen.lm_head.weight, targets.token)
            (expected,) = torch.autograd.grad(loss.sum(), weight)
        # TF32 products inside the flex kernel: three decimal digits
        assert_close(scores.loss, loss, atol=5e-3, rtol=5e-3)
        assert_close(gradient, expected, atol=2e-2, rtol=2e-2)
    assert not torch._dynamo.utils.counters["recompiles"]


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_greedy_tokens_on_the_gpu_equal_those_on_the_cpu_in_float32(byte_tokenizer, mode):
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = make_prompts((1, 7, 8, 21))
    cpu, _ = run(make_model(), byte_tokenizer, prompts, mode=mode, threshold=0.4, sub_block_size=4)
    gpu, _ = run(make_model().cuda(), byte_tokenizer, prompts, mode=mode, threshold=0.4, sub_block_size=4)
    assert [completion.tokens for completion in cpu] == [completion.tokens for completion in gpu]
