"""Gated updates: mask rows alone are changed, by what a dense merged model does; files go to peft and back."""

import json

import pytest
import torch
from conftest import make_qwen
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fastdllm.adapter import (
    TARGETS,
    AdapterSettings,
    adapter_weights,
    add_adapter,
    base_checksum,
    load_adapter,
    num_adapter_parameters,
    save_adapter,
)
from fastdllm.model import BlockDiffusionLM
from fastdllm.training.lora import frozen_checksum

MASK = 259
SETTINGS = AdapterSettings(rank=4, alpha=8.0)


def make_model(seed=0, context="causal", dtype=torch.float32, **changes):
    qwen = make_qwen(seed, initializer_range=0.2, **changes).to(dtype)
    return BlockDiffusionLM(qwen, block_size=4, mask_token_id=MASK, context_attention=context)


def make_adapted(seed=0, settings=SETTINGS, size=0.3, **changes):
    """A model whose adapter holds random updates, as if it were trained."""
    model = make_model(seed, **changes)
    add_adapter(model, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    for weight in adapter_weights(model).values():
        weight.data = size * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def hidden_of(model, tokens, attention_mask=None):
    """Hidden states [B, T, C] of rows that attend causally, unless said otherwise."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()[None, None]
    return model.hidden_states(tokens, positions, causal if attention_mask is None else attention_mask)


def clean_then_masked(num_clean=9, num_masked=5):
    tokens = torch.randint(0, 256, (2, num_clean + num_masked), generator=torch.Generator().manual_seed(0))
    tokens[:, num_clean:] = MASK
    return tokens


def test_an_untrained_adapter_changes_nothing():
    tokens, model = clean_then_masked(), make_model()
    before = hidden_of(model, tokens)
    add_adapter(model, SETTINGS, seed=0)
    assert torch.equal(hidden_of(model, tokens), before)
    assert all(weight.requires_grad for weight in adapter_weights(model).values())
    assert sum(p.requires_grad for p in model.parameters()) == len(adapter_weights(model)) == 2 * 2 * 7 + 1


@pytest.mark.parametrize("size", [0.3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_rows_are_the_base_models_to_the_bit(dtype, size):
    tokens = clean_then_masked()
    base, adapted = make_model(dtype=dtype), make_adapted(size=size, dtype=dtype)
    expected, found = hidden_of(base, tokens), hidden_of(adapted, tokens)
    assert torch.equal(found[:, :9], expected[:, :9])
    assert not torch.equal(found[:, 9:], expected[:, 9:])
    no_masks = tokens[:, :9]
    assert torch.equal(hidden_of(adapted, no_masks), hidden_of(base, no_masks))


def test_not_even_infinite_updates_reach_a_row_that_the_gate_leaves_out():
    layer, rows = make_adapted(size=float("inf")).qwen.model.layers[0].mlp.up_proj, torch.randn(1, 4, 32)
    layer.gate.rows = torch.tensor([True, False, True, False])[None, :, None]
    assert torch.equal(layer(rows)[:, 1::2], layer.base(rows)[:, 1::2]) and not layer(rows)[:, ::2].isfinite().any()


def test_mask_rows_equal_a_dense_merged_model():
    adapted, merged = make_adapted(), make_model()
    weights = {name: weight.detach() for name, weight in adapter_weights(adapted).items()}
    dense = merged.qwen.state_dict()
    for name in [name for name in weights if name.endswith(".reduce")]:
        layer = name.removesuffix(".reduce")
        dense[f"{layer}.weight"] += 8.0 / 4 * weights[f"{layer}.expand"] @ weights[name]
    dense["model.embed_tokens.weight"][MASK] = weights["model.embed_tokens.trained"]
    tokens = torch.full((1, 7), MASK)
    everything = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    assert_close(hidden_of(adapted, tokens, everything), hidden_of(merged, tokens, everything))
    assert (hidden_of(merged, tokens, everything) - hidden_of(make_model(), tokens, everything)).abs().max() > 0.1


def test_the_gate_can_name_all_rows_or_none():
    tokens, adapted = torch.randint(0, 256, (1, 6)), make_adapted()
    layer = adapted.qwen.model.layers[0].mlp.up_proj
    rows = torch.randn(1, 6, 32)
    adapted.gate.rows = torch.ones(1, 6, 1, dtype=torch.bool)
    by_tensor = layer(rows)
    adapted.gate.rows = True
    assert torch.equal(layer(rows), by_tensor)
    adapted.gate.rows = False
    assert torch.equal(layer(rows), layer.base(rows))
    adapted.embed(tokens, torch.arange(6)[None])  # a plain pass sets it by itself
    assert adapted.gate.rows.shape == (1, 6, 1) and not adapted.gate.rows.any()


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], list(TARGETS)])
def test_a_saved_adapter_loads_with_the_same_outputs(tmp_path, targets):
    adapted = make_adapted(settings=AdapterSettings(rank=3, alpha=5.0, targets=targets))
    save_adapter(adapted, tmp_path / "adapter", base="owner/model", facts={"data_tokens": 123})
    save_adapter(adapted, tmp_path / "adapter", base="owner/model", facts={"data_tokens": 123})  # in place of the first
    loaded = make_model()
    load_adapter(loaded, tmp_path / "adapter")
    tokens = clean_then_masked()
    assert torch.equal(hidden_of(loaded, tokens), hidden_of(adapted, tokens))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    gate = json.loads((tmp_path / "adapter" / "fastdllm.json").read_text())
    assert (gate["gate"], gate["base"], gate["data_tokens"]) == ("mask token", "owner/model", 123)
    assert "| data_tokens | 123 |" in (tmp_path / "adapter" / "README.md").read_text()


def test_peft_reads_the_files_and_gives_the_same_update(tmp_path):
    adapted = make_adapted()
    save_adapter(adapted, tmp_path / "adapter")
    assert not hasattr(make_model().qwen, "peft_config")
    theirs = PeftModel.from_pretrained(make_qwen(initializer_range=0.2), tmp_path / "adapter")
    tokens = torch.full((1, 7), MASK)
    with torch.no_grad():
        causal = theirs(tokens).logits[..., :MASK]  # peft ties the mask token's column of the head to its row
    ours = adapted.logits(hidden_of(adapted, tokens))[..., :MASK]
    assert_close(ours, causal)


def test_a_bfloat16_model_runs_a_float32_adapter_and_loads_it_in_its_own_dtype(tmp_path):
    save_adapter(make_adapted(), tmp_path / "adapter", dtype=torch.bfloat16)
    loaded = make_model(dtype=torch.bfloat16)
    load_adapter(loaded, tmp_path / "adapter")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    tokens = clean_then_masked()
    close = dict(atol=0.3, rtol=0.1)  # bfloat16 through two layers of large weights
    assert_close(hidden_of(loaded, tokens).float(), hidden_of(make_adapted(), tokens), **close)
    assert hidden_of(make_adapted(dtype=torch.bfloat16), tokens).dtype == torch.bfloat16


def test_another_base_is_refused(tmp_path):
    save_adapter(make_adapted(), tmp_path / "adapter", base="owner/model")
    with pytest.raises(ValueError, match="belongs to a base .owner/model. with checksum .* load it onto the model"):
        load_adapter(make_model(seed=5), tmp_path / "adapter")


def test_the_trained_row_is_no_view_of_the_frozen_one():
    model = make_model()
    add_adapter(model, SETTINGS, seed=0)
    before = model.qwen.lm_head.weight.clone()  # tied: a float32 row would be trained with it
    with torch.no_grad():
        adapter_weights(model)["model.embed_tokens.trained"] += 1
    assert torch.equal(model.qwen.lm_head.weight, before)


def test_the_checksum_is_the_bases_with_and_without_an_adapter():
    plain, adapted = make_model(), make_adapted()
    assert base_checksum(plain) == base_checksum(adapted) == frozen_checksum(adapted) != 0
    assert base_checksum(plain) == base_checksum(make_model(dtype=torch.bfloat16))
    assert num_adapter_parameters(plain.qwen, SETTINGS) == sum(w.numel() for w in adapter_weights(adapted).values())


def test_what_is_no_gated_adapter_of_this_model_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(make_adapted(), folder)
    config, gate = folder / "adapter_config.json", folder / "fastdllm.json"
    plain, model = json.loads(config.read_text()), make_model()
    for change, message in (
        ({"use_dora": True}, "has use_dora True, which is not read"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
        ({"trainable_token_indices": None}, "tokens None, and the model's mask token is 259"),
        ({"r": 5}, r"28 tensors differ, the first is .*: \(4, 64\) where \(5, 64\) is right"),
        ({"target_modules": ["q_proj"]}, "24 tensors differ, .* where none is right"),
    ):
        config.write_text(json.dumps(plain | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
    config.write_text(json.dumps(plain))
    text = gate.read_text()
    gate.unlink()
    with pytest.raises(FileNotFoundError, match="has no fastdllm.json, .* merge them into the base"):
        load_adapter(model, folder)
    gate.write_text(text)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if "embed" not in name}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="trainable_tokens_delta: missing"):
        load_adapter(model, folder)
    assert model.gate is None and not adapter_weights(model)  # nothing was put in
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        load_adapter(model, tmp_path / "absent")
    with pytest.raises(ValueError, match="context_attention causal, got block"):
        add_adapter(make_model(context="block"), SETTINGS, seed=0)
    with pytest.raises(ValueError, match="has a gated adapter already"):
        add_adapter(make_adapted(), SETTINGS, seed=0)


def test_what_cannot_be_saved_or_merged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no gated adapter to save"):
        save_adapter(make_model(), tmp_path / "adapter")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds thesis.tex, which is no part of an adapter"):
        save_adapter(make_adapted(), tmp_path / "thesis")
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": []}, {"targets": ["lm_head"]}):
        with pytest.raises(ValueError, match=f"adapter.{next(iter(wrong))} must"):
            AdapterSettings(**wrong)
