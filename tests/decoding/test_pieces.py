"""Pieces of text: joined they are the text, and none is ever taken back."""

import random
from itertools import permutations

import pytest

from fastdllm.decoding.pieces import TextPieces, cut_text

END = 257  # <|im_end|>


def pieces_of(tokenizer, tokens, stops=(), chance=None):
    """Feed the tokens some at a time; return what was shown, and the rest."""
    pieces, shown, place = TextPieces(tokenizer, {END}, stops), [], 0
    while place < len(tokens):
        count = chance.randint(1, 4) if chance else 1
        shown.append(pieces.feed(tokens[place : place + count]))
        place += count
    return shown, pieces.finish()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_half_a_character_waits_for_its_other_half(byte_tokenizer):
    shown, rest = pieces_of(byte_tokenizer, ids(byte_tokenizer, "aé€z"))
    assert shown == ["a", "", "é", "", "", "€", "z"] and rest == ""
    shown, rest = pieces_of(byte_tokenizer, ids(byte_tokenizer, "aé")[:-1])
    assert shown == ["a", ""] and rest == "\ufffd"


def test_what_may_become_a_stop_string_waits_and_nothing_behind_one_is_shown(byte_tokenizer):
    shown, rest = pieces_of(byte_tokenizer, ids(byte_tokenizer, "ab--c---d"), ("---",))
    assert shown == ["a", "b", "", "", "--c", "", "", "", ""] and rest == ""
    shown, rest = pieces_of(byte_tokenizer, ids(byte_tokenizer, "ab--"), ("---",))
    assert shown == ["a", "b", "", ""] and rest == "--"


@pytest.mark.parametrize(
    ("text", "stops", "cut"),
    [
        ("xab0c", ("b0c", "ab0"), "x"),  # ab0 is whole before b0c is
        ("xabcd", ("abcd", "bc"), "xa"),
        ("x\n\nQ:", ("Q:", "\n\nQ:"), "x"),  # whole at the same place: the longer one
        ("xyz", ("a", "z", "y"), "x"),
        ("xyz", (), "xyz"),
    ],
)
def test_a_text_is_cut_alike_however_much_of_it_is_known_when_it_ends(text, stops, cut):
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text))
    assert {cut_text(text[:end], orders) for end in range(first, len(text) + 1) for orders in permutations(stops)} == {
        cut
    }


@pytest.mark.parametrize("seed", range(40))
def test_pieces_join_to_the_text_of_the_answer(byte_tokenizer, seed):
    chance = random.Random(seed)
    text = "".join(chance.choices("ab\né€\U0001f600", k=30))
    tokens = ids(byte_tokenizer, text)[: chance.randint(1, 60)]
    if chance.random() < 0.3:
        tokens.insert(chance.randrange(len(tokens)), 255)  # a byte that no character has
    stops = ["".join(chance.choices("ab\né", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))]
    whole = cut_text(byte_tokenizer.decode(tokens, skip_special_tokens=False), stops)
    shown, rest = pieces_of(byte_tokenizer, [*tokens, END], stops, chance)
    assert "".join(shown) + rest == whole
