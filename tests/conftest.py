"""Shared fixtures: a tiny random Qwen2 and a byte tokenizer, both made from code; no downloads."""

import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 272
GROUPS = {  # tests that share what takes long to make, by how their ids begin
    "one Slurm cluster": ("tests/slurm/test_slurm.py", "tests/slurm/test_evaluation.py"),
    "one trained copy of the repository": ("tests/test_docs.py::test_a_command_runs",),
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser):
    parser.addoption("--offline", default="", help="folder with local evaluation data, laid out by hub id")


def pytest_configure(config):
    """Compute with one thread, here and in programs that tests start: models are tiny, and workers share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Put the longest tests first, so that xdist's workers end together."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("slurm", "slow")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand tests out one by one, but all of a group to one worker; xdist's own groups do nothing under pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((group for group, begin in GROUPS.items() if nodeid.startswith(begin)), nodeid)

    return LoadGroups(config, log)


@pytest.fixture(scope="session")
def offline(request):
    folder = request.config.getoption("--offline")
    if not folder:
        pytest.skip("needs --offline DIR (local evaluation data)")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_qwen(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """Return a random Qwen2 of 2 layers, width 32, vocabulary 272, in float32."""
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**shape, **changes})).eval()


@pytest.fixture
def tiny_qwen():
    return make_qwen()
