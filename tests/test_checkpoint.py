"""Checkpoints: every source loads into the same stock Qwen2, exports keep the published form, errors say what to do."""

import json
import shutil

import pytest
import torch
from conftest import make_qwen
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastdllm import checkpoint
from fastdllm.checkpoint import (
    MASK_TOKEN,
    Adaptation,
    add_mask_token,
    empty_model,
    load_checkpoint,
    save_checkpoint,
)

# config.json of the published checkpoints (7B also has `conplemenrary_mask`, which nothing reads).
PUBLISHED_TABLE = """
    architectures model_type auto_map bd_size vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads tie_word_embeddings max_window_layers max_position_embeddings rope_theta
    rope_scaling rms_norm_eps hidden_act attention_dropout initializer_range bos_token_id eos_token_id pad_token_id
    use_sliding_window sliding_window layer_types torch_dtype transformers_version use_cache
"""
PUBLISHED_KEYS = set(PUBLISHED_TABLE.split())
ADAPTATION = Adaptation(block_size=16, task="gsm8k", threshold=0.8, data_tokens=12, base="tiny", revision="abc")


@pytest.fixture
def export(tmp_path, byte_tokenizer):
    """An adapted export in float32 of a tied model with RoPE base 1e6, and the model."""
    qwen = make_qwen(rope_theta=1e6)
    folder = tmp_path / "export"
    mask_token_id = byte_tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    arguments = (qwen.config, byte_tokenizer, mask_token_id, ADAPTATION)
    save_checkpoint(folder, qwen.state_dict(), *arguments, dtype=torch.float32)
    return folder, qwen


def edit(folder, **changes):
    """Change keys of the folder's config.json; None deletes one."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_export_loads_with_the_same_logits_and_memory(export):
    folder, qwen = export
    loaded = load_checkpoint(str(folder))
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded.qwen(tokens).logits, qwen(tokens).logits)
    assert loaded.qwen.lm_head.weight is loaded.qwen.model.embed_tokens.weight
    assert loaded.adaptation == ADAPTATION
    assert loaded.mask_token_id == loaded.tokenizer.convert_tokens_to_ids(MASK_TOKEN) == 259
    assert loaded.source == str(folder)
    assert not loaded.qwen.training


def test_export_has_the_published_config_keys(export):
    raw = config_of(export[0])
    assert set(raw) == PUBLISHED_KEYS | {"mask_token_id", "fastdllm"}
    assert raw["architectures"] == ["Fast_dLLM_QwenForCausalLM"]
    assert raw["model_type"] == "Fast_dLLM_Qwen"
    assert raw["auto_map"]["AutoModelForCausalLM"] == "modeling.Fast_dLLM_QwenForCausalLM"
    assert (raw["rope_theta"], raw["rope_scaling"], raw["bd_size"], raw["torch_dtype"]) == (1e6, None, 16, "float32")
    assert raw["layer_types"] == ["full_attention"] * 2
    eos_token_id = load_checkpoint(str(export[0])).tokenizer.eos_token_id
    assert raw["pad_token_id"] == raw["eos_token_id"] == eos_token_id


def test_export_of_qwen_has_the_published_padding_id():
    from fastdllm.config_json import adapted_config

    arguments = make_qwen().config.to_dict() | {"vocab_size": 151936}
    ids = {"eos_token_id": 151643, "mask_token_id": 151665}
    raw = adapted_config(arguments, torch.bfloat16, adaptation=Adaptation(), **ids)
    assert (raw["pad_token_id"], raw["eos_token_id"], raw["mask_token_id"]) == (151645, 151643, 151665)


def test_export_has_the_published_weight_names(export):
    folder, qwen = export
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(qwen.state_dict()) - {"lm_head.weight"}
    written = {path.name for path in folder.iterdir()}
    assert written >= {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not list(folder.parent.glob("*.partial")) and not list(folder.parent.glob("*.old"))


@pytest.mark.parametrize(
    "spelling",
    [{}, {"rope_theta": None, "torch_dtype": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}],
)
def test_both_rope_spellings_load_with_the_right_base(export, spelling):
    folder, _ = export
    edit(folder, **spelling, dtype="bfloat16")
    frequencies = load_checkpoint(str(folder)).qwen.model.rotary_emb.inv_freq
    assert_close(frequencies, 1e6 ** -(torch.arange(0, 8, 2) / 8))


def test_bfloat16_keeps_float32_rope_frequencies(export):
    qwen = load_checkpoint(str(export[0]), dtype=torch.bfloat16).qwen
    assert {parameter.dtype for parameter in qwen.parameters()} == {torch.bfloat16}
    assert qwen.model.rotary_emb.inv_freq.dtype == qwen.model.rotary_emb.original_inv_freq.dtype == torch.float32


def test_the_padding_row_keeps_its_gradient(export):
    qwen = load_checkpoint(str(export[0])).qwen
    row = qwen.config.pad_token_id  # the published class gives it no gradient
    assert qwen.model.embed_tokens.padding_idx is None
    qwen.model.embed_tokens(torch.tensor([row])).sum().backward()
    assert qwen.model.embed_tokens.weight.grad[row].abs().sum() > 0


def test_a_published_folder_loads_without_our_keys(export):
    folder, qwen = export
    edit(folder, mask_token_id=None, fastdllm=None, bd_size=4)
    save_file(load_file(folder / "model.safetensors") | {"lm_head.weight": qwen.lm_head.weight.clone()}, folder / "a")
    (folder / "a").replace(folder / "model.safetensors")  # published tied models may store the head
    loaded = load_checkpoint(str(folder))
    assert loaded.adaptation == Adaptation(block_size=4, sub_block_size=4)
    assert loaded.model().block_size == 4


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_stock_folder_loads_and_comes_back_for_stock_transformers(tmp_path, byte_tokenizer, is_tied):
    qwen = make_qwen(tie_word_embeddings=is_tied)
    qwen.save_pretrained(tmp_path / "stock")  # the spelling of transformers 5
    byte_tokenizer.save_pretrained(tmp_path / "stock")
    loaded = load_checkpoint(str(tmp_path / "stock"))
    assert loaded.adaptation is None
    assert loaded.model().context_attention == "causal"
    arguments = (loaded.qwen.config, loaded.tokenizer, loaded.mask_token_id, None, torch.float32)
    save_checkpoint(tmp_path / "again", loaded.qwen.state_dict(), *arguments)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens).logits, qwen(tokens).logits)
    assert set(config_of(tmp_path / "again")) == PUBLISHED_KEYS - {"auto_map", "bd_size"}
    assert load_checkpoint(str(tmp_path / "again")).adaptation is None


def test_shards_load_and_a_missing_one_is_named(export, byte_tokenizer, monkeypatch):
    folder, qwen = export
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    save_checkpoint(folder, qwen.state_dict(), qwen.config, byte_tokenizer, 259, ADAPTATION, torch.float32)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    loaded = load_checkpoint(str(folder))
    assert torch.equal(loaded.qwen.model.embed_tokens.weight, qwen.model.embed_tokens.weight)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load_checkpoint(str(folder))


def test_size_counts_a_tied_embedding_once_without_weights(export):
    folder, qwen = export
    (folder / "model.safetensors").unlink()
    assert empty_model(str(folder)).num_parameters() == sum(parameter.numel() for parameter in qwen.parameters())


def test_digest_follows_weights_and_config_but_not_the_writer(export):
    folder, _ = export
    edit(folder)
    first = load_checkpoint(str(folder)).digest
    assert len(first) == 16
    edit(folder, transformers_version="9.9")
    assert load_checkpoint(str(folder)).digest == first
    edit(folder, rms_norm_eps=1e-5)
    second = load_checkpoint(str(folder)).digest
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] + 1}, folder / "model.safetensors")
    assert len({first, second, load_checkpoint(str(folder)).digest}) == 3


def test_tokenizer_comes_back_equal(export, byte_tokenizer):
    loaded = load_checkpoint(str(export[0])).tokenizer
    text = "<|im_start|>user\n12 + 30 = 42, ö|<MASK>|<|im_end|>"
    assert loaded(text)["input_ids"] == byte_tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == byte_tokenizer.get_vocab()
    assert loaded.chat_template == byte_tokenizer.chat_template
    assert loaded.eos_token_id == byte_tokenizer.eos_token_id


def without_mask_token(byte_tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    raw = json.loads(plain.backend_tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != MASK_TOKEN]
    plain._tokenizer = type(plain.backend_tokenizer).from_str(json.dumps(raw))
    return plain


def test_mask_token_takes_the_first_free_id(byte_tokenizer):
    tokenizer = without_mask_token(byte_tokenizer)
    assert len(tokenizer) == 259
    assert add_mask_token(tokenizer, 272) == 259
    assert tokenizer("a|<MASK>|")["input_ids"][-1] == 259
    assert tokenizer.decode([259], skip_special_tokens=True) == ""


@pytest.mark.parametrize(("vocab_size", "message"), [(259, "only 259 rows"), (151936, "must have id 151665")])
def test_mask_token_without_a_row_or_the_published_id_is_refused(byte_tokenizer, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        add_mask_token(byte_tokenizer, vocab_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'; only qwen2"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"head_dim": 64}, "head_dim must be"),
        ({"rope_theta": None}, "one RoPE base .*got none"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "got 10000.0 and 1000000.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales RoPE .yarn."),
        ({"bd_size": None}, "lacks bd_size"),
        ({"bd_size": 32}, "bd_size is 32 but fastdllm.block_size 16"),
        ({"fastdllm": {"block_size": 16, "colour": 1}}, "unknown keys in config.json's fastdllm: colour"),
        ({"mask_token_id": 260}, "do not belong together"),
        ({"num_hidden_layers": 3}, "12 missing .such as model.layers.2"),
        ({"num_hidden_layers": 1}, "12 unexpected .such as model.layers.1"),
        ({"intermediate_size": 96}, "6 of another shape"),
        ({"tie_word_embeddings": False}, "1 missing .such as lm_head.weight"),
    ],
)
def test_an_unsupported_config_is_refused_with_its_reason(export, changes, message):
    edit(export[0], **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(export[0]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "no config"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "neither model"),
    ],
)
def test_a_missing_file_is_named(export, name, message):
    (export[0] / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(str(export[0]))


def test_pickled_weights_are_never_read(export):
    (export[0] / "model.safetensors").rename(export[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never read; use safetensors"):
        load_checkpoint(str(export[0]))


def test_a_tokenizer_without_chat_template_is_refused(export):
    (export[0] / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_checkpoint(str(export[0]))


def test_a_tied_model_with_another_head_is_refused(export):
    folder, qwen = export
    save_file(load_file(folder / "model.safetensors") | {"lm_head.weight": qwen.lm_head.weight + 1}, folder / "a")
    (folder / "a").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match="unlike its embedding"):
        load_checkpoint(str(folder))


def test_sources_that_do_not_exist_say_what_to_give(tmp_path, monkeypatch):
    for source in (str(tmp_path / "absent"), "absent.gguf", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="give an HF folder, a .gguf file or a hub id"):
            load_checkpoint(source)
    (tmp_path / "tiny-adapted").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"does not exist \(did you mean {tmp_path}/tiny-adapted\?\)"):
        load_checkpoint(str(tmp_path / "tiny-adaptd"))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="no .gguf"):
        load_checkpoint(str(tmp_path / "weights.bin"))


def test_a_hub_id_is_downloaded_without_code_and_loaded(export, monkeypatch):
    asked = []

    def download(source, allow_patterns):
        asked.append((source, allow_patterns))
        return str(export[0])

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert load_checkpoint("owner/name").adaptation == ADAPTATION
    assert empty_model("owner/name").num_parameters() > 0
    assert asked[0][0] == "owner/name" and asked[1][1] == ["config.json"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked[0][1])


def test_a_hub_id_without_network_says_to_give_a_folder(monkeypatch):
    def download(source, allow_patterns):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    with pytest.raises(
        FileNotFoundError, match=r"\(ConnectionError: no route\). Give a local HF folder or a .gguf file"
    ):
        load_checkpoint("owner/name")


def test_a_save_replaces_a_checkpoint_but_nothing_else(export, byte_tokenizer, tmp_path):
    folder, qwen = export
    arguments = (qwen.state_dict(), qwen.config, byte_tokenizer, 259, ADAPTATION)
    (folder / "model-00001-of-00002.safetensors").touch()
    save_checkpoint(folder, *arguments)
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert config_of(folder)["torch_dtype"] == "bfloat16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for target in (tmp_path / "mine", folder):
        (folder / "test.jsonl").touch()
        with pytest.raises(ValueError, match="is no part of a checkpoint"):
            save_checkpoint(target, *arguments)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_save_of_incomplete_weights_leaves_the_old_export(export, byte_tokenizer):
    folder, qwen = export
    before = load_checkpoint(str(folder)).digest
    weights = qwen.state_dict()
    weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match="1 missing .such as model.norm.weight"):
        save_checkpoint(folder, weights, qwen.config, byte_tokenizer, 259, ADAPTATION)
    shutil.rmtree(folder.with_name("export.partial"), ignore_errors=True)
    assert load_checkpoint(str(folder)).digest == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_token": "both"}, "first_token must be one of noised, clean"),
        ({"context_attention": "full"}, "context_attention must be one of block, causal"),
        ({"sub_block_size": 12}, "sub_block_size must divide block_size .32., got 12"),
        ({"block_size": 24}, "power of two"),
        ({"threshold": 0.0}, "threshold must lie in"),
    ],
)
def test_an_impossible_adaptation_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Adaptation(**changes)
