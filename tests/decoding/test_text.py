"""Text in, text out: streaming equals generating, and options are checked."""

import pytest

from decoding.test_engine import make_model
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.decoding.text import TextGenerator


def make_generator(tokenizer, mode="diffusion", seed=0, context="block"):
    decode = DecodeConfig(sub_block_size=4, threshold=0.8)  # as an export remembers it
    return TextGenerator(make_model(seed=seed, context=context), tokenizer, mode, decode)


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


def test_verified_text_is_that_of_mode_ar_and_its_pieces_join_to_it(byte_tokenizer):
    generator, plain = (make_generator(byte_tokenizer, mode, context="causal") for mode in ("diffusion", "ar"))
    options = dict(max_new_tokens=21, policy="verified", draft_length=3)
    for prompt in ("one", "another"):
        assert generator.generate(prompt, **options) == plain.generate(prompt, max_new_tokens=21)
        assert "".join(generator.stream(prompt, **options)) == plain.generate(prompt, max_new_tokens=21)
    for name, value in (("sub_block_size", 8), ("use_block_cache", True)):
        with pytest.raises(ValueError, match=f"option '{name}' has no effect in policy verified"):
            generator.generate("one", **options, **{name: value})
