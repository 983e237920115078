"""benchmarks/check_published.py: our engine against the reference of the published decoders, and that it can fail."""

import importlib
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import make_qwen

from fastdllm.checkpoint import MASK_TOKEN, Adaptation, load_checkpoint, save_checkpoint

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PUBLISHED_FILES = {
    "configuration.py": "",
    "modeling.py": """
        import types
        import published_reference
        from fastdllm.checkpoint import load_checkpoint

        class Fast_dLLM_QwenForCausalLM:
            @classmethod
            def from_pretrained(cls, folder, torch_dtype, use_safetensors):
                self = cls()
                self.model = load_checkpoint(folder, dtype=torch_dtype).model()
                return self

            def to(self, device):
                return self

            def eval(self):
                return self

            def generate(self, input_ids, **options):
                return published_reference.generate(self.model, input_ids, **options)
        """,
    "generation_functions.py": """
        import published_reference

        class Fast_dLLM_QwenForCausalLM:
            def batch_sample(self, input_ids, **options):
                return published_reference.batch_sample(self.model, input_ids, **options)
        """,
}


@pytest.fixture
def check_published(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("check_published")


@pytest.fixture
def make_export(tmp_path, byte_tokenizer):
    def make(sharpness=8.0, seed=0, stop_factor=1.0, **adaptation):
        # large random weights: varied predictions; an untied, scaled head: some confidences above 0.9, few mask tokens
        qwen = make_qwen(seed, initializer_range=0.35, num_hidden_layers=3, tie_word_embeddings=False)
        qwen.lm_head.weight.data *= sharpness
        qwen.lm_head.weight.data[byte_tokenizer.eos_token_id] *= stop_factor  # large: a likely stop token
        mask_token_id = byte_tokenizer.convert_tokens_to_ids(MASK_TOKEN)
        arguments = (qwen.state_dict(), qwen.config, byte_tokenizer, mask_token_id, Adaptation(**adaptation))
        save_checkpoint(tmp_path / "export", *arguments, dtype=torch.float32)
        return str(tmp_path / "export")

    return make


def compare(check_published, export, change_published=None, **options):
    """Return the cells; `change_published` changes the options of the decoders that ours are compared with."""
    config = check_published.CheckConfig(checkpoint=export, **options)
    checkpoint = load_checkpoint(export)
    published = None
    if change_published:
        functions = (check_published.published_reference.generate, check_published.published_reference.batch_sample)

        def changed(function, *arguments, **options):
            return function(checkpoint.model(), *arguments, **options | change_published)

        published = check_published.Decoders(*(partial(changed, function) for function in functions))
    return list(check_published.Comparison(checkpoint, config, published).cells())


@pytest.mark.parametrize(
    ("block_size", "sub_block_size", "max_new_tokens", "sharpness"),
    [(8, 4, 24, 8.0), (8, 8, 16, 8.0), (8, 4, 16, 1.0), (32, 8, 32, 8.0)],
)
def test_engine_decodes_what_the_published_description_decodes(
    check_published, make_export, block_size, sub_block_size, max_new_tokens, sharpness
):
    export = make_export(sharpness, block_size=block_size, sub_block_size=sub_block_size)
    cells = compare(check_published, export, max_new_tokens=max_new_tokens)
    assert len(cells) == 8
    for cell in cells:
        assert cell.compared > 0
        assert [difference for difference in cell.differences if not difference.is_rounding] == []
        assert cell.compared + cell.left_out.total() == 16


@pytest.mark.parametrize(("seed", "rule"), [(0, 2), (12, 5)])
def test_answers_that_stop_agree_and_the_stop_defects_are_counted(check_published, make_export, seed, rule):
    export = make_export(seed=seed, stop_factor=12.0, block_size=8, sub_block_size=4)
    cells = compare(check_published, export, max_new_tokens=16)
    assert not check_published.has_failed(cells)
    rules = set().union(*(cell.left_out.keys() | cell.cut_short.keys() for cell in cells))
    assert rule in rules


def test_another_threshold_is_reported_as_a_difference(check_published, make_export, capsys):
    cells = compare(check_published, make_export(), {"threshold": 0.3}, num_prompts=3, max_new_tokens=32)
    assert all(cell.differences for cell in cells if cell.decoder == "generate")
    assert check_published.has_failed(cells)
    check_published.show(cells)
    assert "a real difference" in capsys.readouterr().out


def test_another_block_size_than_the_published_one_leaves_everything_out(check_published, make_export):
    cells = compare(check_published, make_export(block_size=8), {"top_p": 0.9}, num_prompts=3, max_new_tokens=8)
    assert all(cell.left_out == {8: 3} for cell in cells)
    assert check_published.has_failed(cells)


def test_a_published_folder_is_imported_and_compared(check_published, make_export, tmp_path, capsys):
    for name, text in PUBLISHED_FILES.items():
        (tmp_path / name).write_text(dedent(text))
    options = dict(checkpoint=make_export(), num_prompts=5, max_new_tokens=32)
    check_published.check(check_published.CheckConfig(published=str(tmp_path), **options))
    assert f"against the code in {tmp_path}" in capsys.readouterr().out
    (tmp_path / "modeling.py").unlink()
    with pytest.raises(FileNotFoundError, match="modeling.py"):
        check_published.check(check_published.CheckConfig(published=str(tmp_path), **options))


def test_a_model_with_causal_context_is_refused(check_published, make_export):
    config = check_published.CheckConfig(checkpoint=make_export(context_attention="causal"))
    with pytest.raises(ValueError, match="block-causally"):
        check_published.check(config)
