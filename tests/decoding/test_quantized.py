"""Weights of one byte: how far they are from the model's, and that the engine decodes with what they say."""

import pytest
import torch
from torch.testing import assert_close

from decoding.test_engine import make_model, make_prompts
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine, Request
from fastdllm.decoding.quantized import STORED, check_format, quantize


@pytest.mark.parametrize(("weight_format", "relative"), [("int8", 0.5 / 127), ("float8", 1 / 16)])
def test_a_value_is_off_by_half_a_step_at_most(weight_format, relative):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # a row without a largest value
    values, scale = quantize(weight, weight_format)
    assert values.dtype == STORED[weight_format][0]
    found = values.float() * scale[:, None]
    # int8: half a step of the row's largest; float8: half of the last of three bits of each value
    off = (found - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    allowed = relative * largest if weight_format == "int8" else relative * weight.abs() + largest * 2**-9 / 448
    assert (off <= allowed * 1.001).all() and (off > 0).any()
    assert_close(found.abs().amax(1), weight.abs().amax(1))


def test_the_models_own_format_changes_nothing():
    weight = torch.randn(3, 4)
    assert quantize(weight, "model") is weight


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
@pytest.mark.parametrize("weight_format", STORED)
def test_the_engine_decodes_as_a_model_with_rounded_weights(byte_tokenizer, weight_format, mode):
    requests = [Request(prompt=prompt, max_new_tokens=20) for prompt in make_prompts((5, 16, 30))]
    decode = {"threshold": 0.4, "sub_block_size": 4} if mode == "diffusion" else {}
    answers = []
    for is_rounded in (False, True):
        model = make_model(hidden_size=64)
        if is_rounded:
            head = model.qwen.lm_head  # tied to the embeddings, which stay as they are
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            for name, parameter in model.qwen.named_parameters():
                if name == "lm_head.weight" or ("layers" in name and parameter.dim() == 2):
                    values, scale = quantize(parameter.detach(), weight_format)
                    parameter.data = values.float() * scale[:, None]
        config = DecodeConfig(**decode, weight_format="model" if is_rounded else weight_format)
        engine = Engine(model, byte_tokenizer, mode=mode, decode=config, batch_size=2)
        answers.append([one.tokens for one in sorted(engine.run(requests), key=lambda one: one.index)])
    assert answers[0] == answers[1]


def test_what_cannot_be_is_refused(byte_tokenizer):
    with pytest.raises(ValueError, match="weight_format must be one of model, int8, float8, got 'int4'"):
        DecodeConfig(weight_format="int4")
    with pytest.raises(ValueError, match="weight_format int8 needs the fused pass; set is_fused true"):
        Engine(make_model(), byte_tokenizer, decode=DecodeConfig(weight_format="int8"), is_fused=False)


def test_float8_is_refused_on_ampere_alone(monkeypatch):
    capability = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["it"])
    cuda = torch.device("cuda")
    for capability["it"] in ((7, 5), (8, 9), (9, 0)):
        check_format("float8", cuda)
    capability["it"] = (8, 6)
    check_format("int8", cuda)
    with pytest.raises(ValueError, match="needs a GPU of compute capability 8.9 or more, this one has 8.6; take int8"):
        check_format("float8", cuda)
