"""GGUF files: tensors, ties and tokenizer come back as the transformers model they were written from."""

import gguf
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, make_qwen
from gguf import GGMLQuantizationType as Quantisation
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from torch.testing import assert_close

from fastdllm.checkpoint import empty_model, load_checkpoint
from fastdllm.gguf import CONFIG_KEYS, GLOBAL_NAMES, LAYER_NAMES, rename

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = BYTES[:-1] + ["12", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # 259: one byte made room for a merge
TYPES = [1] * 256 + [3] * 3
GGUF_NAMES = {new: old for old, new in (GLOBAL_NAMES | {f"{k}.": f"{v}." for k, v in LAYER_NAMES.items()}).items()}


def gguf_name(name):
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, *rest, kind = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(rest) + '.']}{kind}"


def write(path, qwen, kinds=None, output=None, omit=(), architecture="qwen2", **metadata):
    """Write `qwen` in float32, but the GGUF names in `kinds` in theirs; `output` is a second embedding matrix."""
    writer = GGUFWriter(path, architecture)
    for key, name in CONFIG_KEYS.items():
        value = qwen.config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(qwen.config, key)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if name not in omit:
            add(f"qwen2.{name}", value)
    for key, value in {"model": "gpt2", "pre": "qwen2", **metadata}.items():
        writer.add_string(f"tokenizer.ggml.{key}" if "." not in key else key, value)
    writer.add_token_list(TOKENS + [f"[PAD{index}]" for index in range(259, 272)])
    writer.add_token_types(TYPES + [5] * 13)
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(258)
    if "chat_template" not in omit:
        writer.add_chat_template(CHAT_TEMPLATE)
    tensors = {gguf_name(name): value.numpy() for name, value in qwen.state_dict().items() if name != "lm_head.weight"}
    if output is not None:
        tensors["output.weight"] = output.detach().numpy()
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, Quantisation.F32)
        if name not in omit:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def test_a_tied_file_without_output_matrix_loads_every_tensor(path):
    qwen = make_qwen(rope_theta=1e6)
    loaded = load_checkpoint(write(path, qwen))
    assert_close(dict(loaded.qwen.state_dict()), dict(qwen.state_dict()), rtol=0, atol=0)
    assert loaded.qwen.lm_head.weight is loaded.qwen.model.embed_tokens.weight
    assert torch.equal(loaded.qwen(torch.arange(9)[None]).logits, qwen(torch.arange(9)[None]).logits)
    assert loaded.qwen.config.rms_norm_eps == 1e-6
    assert loaded.adaptation is None and len(loaded.digest) == 16
    assert empty_model(str(path)).num_parameters() == sum(parameter.numel() for parameter in qwen.parameters())


@pytest.mark.parametrize("precise", ["token_embd.weight", "output.weight"])
def test_of_two_copies_the_more_precise_one_is_kept(path, precise):
    qwen = make_qwen()
    kinds = dict.fromkeys(("token_embd.weight", "output.weight"), Quantisation.Q4_0) | {precise: Quantisation.Q8_0}
    loaded = load_checkpoint(write(path, qwen, kinds, output=qwen.lm_head.weight)).qwen
    expected = qwen.model.embed_tokens.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(expected, Quantisation.Q8_0), Quantisation.Q8_0)
    assert loaded.config.tie_word_embeddings
    assert np.array_equal(loaded.model.embed_tokens.weight.detach().numpy(), expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_untied_file_keeps_both_matrices(path):
    qwen = make_qwen(tie_word_embeddings=False)
    loaded = load_checkpoint(write(path, qwen, output=qwen.lm_head.weight)).qwen
    assert not loaded.config.tie_word_embeddings
    assert_close(dict(loaded.state_dict()), dict(qwen.state_dict()), rtol=0, atol=0)


def test_weights_come_in_the_wanted_dtype_with_float32_frequencies(path):
    qwen = load_checkpoint(write(path, make_qwen()), dtype=torch.bfloat16).qwen
    assert {parameter.dtype for parameter in qwen.parameters()} == {torch.bfloat16}
    assert qwen.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_tokenizer_drops_placeholders_and_keeps_ids(path):
    loaded = load_checkpoint(write(path, make_qwen()))
    tokenizer = loaded.tokenizer
    assert loaded.mask_token_id == 259 and len(tokenizer) == 260
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == list(range(259))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token is None
    text = "<|im_start|>user\n3 + 12 = 15<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 257 and ids[-1] == 258 and tokenizer.decode(ids) == text
    assert "12" not in tokenizer.convert_ids_to_tokens(ids)  # digits are split before merges, as in Qwen2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).endswith("<|im_end|>\n")


def test_names_of_real_files_are_translated():
    assert rename("blk.10.attn_q.bias") == "model.layers.10.self_attn.q_proj.bias"
    assert rename("blk.0.ffn_down.weight") == "model.layers.0.mlp.down_proj.weight"
    assert rename("rope_freqs.weight") == "rope_freqs.weight"  # unknown: the loader reports it as unexpected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "llama"}, "'llama'; only qwen2"),
        ({"omit": ("block_count",)}, "has no qwen2.block_count"),
        ({"omit": ("token_embd.weight",)}, "has no token_embd.weight"),
        ({"omit": ("blk.1.attn_k.bias",)}, "1 missing .such as model.layers.1.self_attn.k_proj.bias"),
        ({"omit": ("chat_template",)}, "no chat template"),
        ({"model": "llama"}, "tokenizer 'llama/qwen2' is not supported"),
        ({"qwen2.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
        ({"output": torch.zeros(8, 32)}, "must be equal, so the file is damaged"),
    ],
)
def test_an_unsupported_file_is_refused_with_its_reason(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(write(path, make_qwen(), **arguments))


def test_a_file_that_is_no_gguf_is_refused(path):
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        load_checkpoint(str(path))
