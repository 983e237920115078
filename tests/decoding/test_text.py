"""Text in, text out: streaming equals generating, and options are checked."""

import pytest

from decoding.test_engine import make_model
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.decoding.text import TextGenerator


def make_generator(tokenizer, mode="diffusion", seed=0):
    return TextGenerator(make_model(seed=seed), tokenizer, mode, DecodeConfig(sub_block_size=4))


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_the_pieces_of_a_stream_join_to_what_generate_returns(byte_tokenizer, mode):
    for seed in range(6):
        generator = make_generator(byte_tokenizer, mode, seed)
        options = {} if mode == "ar" else {"threshold": 0.4, "reuse_k": 2, "subset": "middle"}
        whole = generator.generate(f"prompt {seed}", max_new_tokens=21, **options)
        pieces = list(generator.stream(f"prompt {seed}", max_new_tokens=21, **options))
        assert "".join(pieces) == whole and len(pieces) > 1


def test_messages_are_taken_as_they_are_and_wrong_options_are_refused(byte_tokenizer):
    generator = make_generator(byte_tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    assert generator.generate(messages, max_new_tokens=9) == generator.generate("hi", max_new_tokens=9)
    with pytest.raises(ValueError, match="unknown option 'treshold'"):
        generator.generate("hi", treshold=0.5)
    with pytest.raises(ValueError, match="has no effect token by token"):
        make_generator(byte_tokenizer, "ar").generate("hi", threshold=0.5)
