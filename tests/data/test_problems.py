import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest
from fresh import fresh_checkpoint, train_tokenizer
from problems import LARGEST, ProblemsConfig, problem
from stories import EVENTS, HELD_OUT_FORMS, OPENINGS, TRAINED_FORMS
from transformers import AutoTokenizer

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
TINY = Path(__file__).parents[2] / "data" / "tiny"


@pytest.fixture(scope="module")
def splits():
    counts = {"train": 4000, "validation": 200, "test": 200}
    return {split: [problem(0, index, split) for index in range(count)] for split, count in counts.items()}


@pytest.fixture(scope="module")
def tokenizer(splits):
    return train_tokenizer((f"{record['prompt']}\n{record['response']}" for record in splits["train"]), 640)


def numbers(record):
    return record["form"], tuple(re.findall(r"\d+", record["prompt"]))


def test_a_problem_is_a_function_of_seed_index_and_split():
    assert problem(0, 7, "train") == problem(0, 7, "train")
    assert len({problem(seed, 7, split)["prompt"] for seed in (0, 1) for split in ("train", "validation", "test")}) == 6


def test_the_checked_in_problems_are_those_of_seed_zero(splits):
    for split in ("validation", "test"):
        assert [json.loads(line) for line in (TINY / f"{split}.jsonl").read_text().splitlines()] == splits[split]


def test_no_split_shares_a_text_or_the_numbers_of_a_form_with_another(splits):
    other_seed = [problem(1, index, "train") for index in range(2000)]
    train, validation, test = splits["train"] + other_seed, splits["validation"], splits["test"]
    for key in (numbers, lambda record: record["prompt"]):
        train_keys, validation_keys, test_keys = (
            {key(record) for record in part} for part in (train, validation, test)
        )
        assert not train_keys & validation_keys
        assert not (train_keys | validation_keys) & test_keys
    assert len({record["prompt"] for record in test}) == 200


def test_the_held_out_forms_occur_in_the_test_split_alone(splits):
    assert not set(TRAINED_FORMS) & set(HELD_OUT_FORMS)
    for split in ("train", "validation"):
        forms = {record["form"] for record in splits[split]}
        assert forms >= set(TRAINED_FORMS) and not any(form.startswith(HELD_OUT_FORMS) for form in forms)
        assert {record["split"] for record in splits[split]} == {"numbers"}
    assert {record["form"] for record in splits["validation"]} == set(TRAINED_FORMS)
    assert len({record["form"] for record in splits["train"]}) > 500
    assert Counter(record["split"] for record in splits["test"]) == {"numbers": 160, "forms": 40}
    assert {record["form"] for record in splits["test"] if record["split"] == "forms"} == set(HELD_OUT_FORMS)


def test_held_out_forms_are_new_sequences_of_trained_events():
    trained_events = {name for form in TRAINED_FORMS for name in form.split()}
    assert {name for form in HELD_OUT_FORMS for name in form.split()} <= trained_events == {*OPENINGS, *EVENTS}
    assert len(TRAINED_FORMS) >= 24 and len(set(TRAINED_FORMS)) == len(TRAINED_FORMS)
    assert all(not trained.startswith(form) for form in HELD_OUT_FORMS for trained in TRAINED_FORMS)


def test_every_calculation_is_right_and_the_last_one_is_the_answer(splits):
    for record in [record for records in splits.values() for record in records]:
        steps = STEP.findall(record["response"])
        assert 2 <= len(steps) <= 5
        assert record["response"].count("=") == len(steps)
        for left, sign, right, result in steps:
            assert APPLY[sign](int(left), int(right)) == int(result), record
            assert 1 <= int(result) <= LARGEST
        assert record["response"].endswith(f" {steps[-1][-1]}.\n#### {record['answer']}")
        assert record["answer"] == steps[-1][-1]


def test_every_number_of_the_problem_is_used_and_small(splits):
    for record in splits["train"]:
        given = re.findall(r"\d+", record["prompt"])
        assert all(int(number) <= 20 or number in ("30", "40", "50") for number in given)
        assert not Counter(given) - Counter(re.findall(r"\d+", record["response"]))


def test_answers_are_longer_than_a_block_on_average(splits, tokenizer):
    lengths = [len(tokenizer.encode(record["response"])) for record in splits["validation"]]
    assert 45 <= sum(lengths) / len(lengths) <= 80


def test_the_tokenizer_survives_saving_and_splits_numbers_into_digits(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Tom has 12 héllo ✓\n  x"
    assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    assert loaded.tokenize("Tom has 12") == ["Tom", "Ġhas", "Ġ", "1", "2"]
    assert (loaded.eos_token, loaded.pad_token, len(loaded)) == ("<|im_end|>", "<|endoftext|>", len(tokenizer))
    assert loaded.encode("|<MASK>|") == [loaded.convert_tokens_to_ids("|<MASK>|")]
    assert len(loaded) <= 640 and (tmp_path / "tokenizer.json").stat().st_size < 60_000


def test_the_chat_template_marks_the_response_through_its_newline(tokenizer, splits):
    record = splits["test"][0]
    turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    pairs = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    assert tokenizer.decode([token for token, is_response in pairs if is_response]) == (
        record["response"] + "<|im_end|>\n"
    )
    header = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert header == f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([token for token, is_response in pairs if not is_response]) == header


def test_a_fresh_checkpoint_is_a_function_of_its_seed(tokenizer, tmp_path):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fresh_checkpoint(tmp_path / name, tokenizer, seed, **shape)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vocab_size"] % 16 == 0 and 0 <= config["vocab_size"] - len(tokenizer) < 16
    assert config["tie_word_embeddings"] and config["rope_parameters"]["rope_theta"] == 10_000


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_test": -1}, {"seed": -1}])
def test_a_config_refuses_impossible_counts(wrong):
    with pytest.raises(ValueError, match="num_train must be at least 1"):
        ProblemsConfig(**wrong)


def test_the_tokenizer_refuses_a_vocabulary_smaller_than_the_bytes():
    with pytest.raises(ValueError, match="at least 260"):
        train_tokenizer(["x"], 100)
