import gzip
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

import fastdllm.data.documents as documents_module
from fastdllm.data.datamodule import DataConfig
from fastdllm.data.documents import Documents, prepare_documents
from fastdllm.data.sources import SourceConfig, check_source, parse_row, render, tokenize


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prepare(tmp_path, tokenizer, **fields):
    workers = fields.pop("num_workers", 0)
    return Documents(prepare_documents(SourceConfig(**fields), tokenizer, str(tmp_path / "prepared"), workers))


def texts(documents, tokenizer):
    """The whole text and the response text of each document."""
    found = []
    for begin, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        tokens, is_response = documents.tokens[begin:end], documents.is_response[begin:end]
        found.append((tokenizer.decode(tokens), tokenizer.decode(tokens[is_response])))
    return found


MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
    {"role": "user", "content": "Thanks."},
]


def test_every_assistant_turn_is_supervised_with_its_end_and_newline(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": MULTI_TURN}])
    documents = prepare(tmp_path, byte_tokenizer, path=path)
    [(text, response)] = texts(documents, byte_tokenizer)
    assert response == "4<|im_end|>\n6<|im_end|>\n"
    assert text == byte_tokenizer.apply_chat_template(MULTI_TURN[:5], tokenize=False)
    whole = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert documents.tokens.tolist() == whole


def test_gzip_and_plain_files_share_one_cache(tmp_path, byte_tokenizer):
    row = json.dumps({"prompt": "hé?", "response": "yes"}) + "\n"
    (tmp_path / "a.jsonl").write_text(row)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(row)
    plain = prepare(tmp_path, byte_tokenizer, path=str(tmp_path / "a.jsonl"))
    packed = prepare(tmp_path, byte_tokenizer, path=str(tmp_path / "a.jsonl.gz"))
    assert plain.folder == packed.folder
    assert texts(plain, byte_tokenizer)[0][1] == "yes<|im_end|>\n"


def test_columns_as_in_the_nemotron_dataset(tmp_path, byte_tokenizer):
    row = {"input": [{"role": "user", "content": "Q"}], "output": "A", "system_prompt": "thinking off", "extra": 1}
    columns = {"prompt_column": "input", "response_column": "output", "system_column": "system_prompt"}
    documents = prepare(tmp_path, byte_tokenizer, path=write_lines(tmp_path / "a.jsonl", [row]), **columns)
    [(text, response)] = texts(documents, byte_tokenizer)
    assert text.startswith("<|im_start|>system\nthinking off<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n")
    assert response == "A<|im_end|>\n"


def test_messages_are_read_from_the_column_that_is_named(tmp_path, byte_tokenizer):
    rows = [{"talk": MULTI_TURN, "messages": [{"role": "user", "content": "another column"}]}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    [(_, response)] = texts(prepare(tmp_path, byte_tokenizer, path=path, messages_column="talk"), byte_tokenizer)
    assert response == "4<|im_end|>\n6<|im_end|>\n"


def test_several_files_are_read_in_order_and_limited(tmp_path, byte_tokenizer):
    names = [
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": "p", "response": f"{name}{i}"} for i in range(2)])
        for name in "ab"
    ]
    documents = prepare(tmp_path, byte_tokenizer, path=", ".join(names), limit=3)
    assert [response[:2] for _, response in texts(documents, byte_tokenizer)] == ["a0", "a1", "b0"]


# not JSON, not an object, no response, no assistant turn
MALFORMED = ["{not json", json.dumps([1]), json.dumps({"prompt": "p"}), json.dumps({"messages": MULTI_TURN[:2]})]


def test_malformed_lines_are_reported_with_their_number_and_counted(tmp_path, byte_tokenizer, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}, *MALFORMED])
    documents = prepare(tmp_path, byte_tokenizer, path=path)
    assert (len(documents), documents.meta["malformed"]) == (1, 4)
    printed = capsys.readouterr().out
    assert f"{path}:2: not JSON" in printed and f"{path}:5: no assistant turn" in printed
    assert "4 of 5 rows malformed" in printed


def test_strict_stops_at_the_first_malformed_line_and_leaves_nothing(tmp_path, byte_tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}, *MALFORMED])
    with pytest.raises(ValueError, match=r"data.strict: malformed row at .*a.jsonl:2"):
        prepare(tmp_path, byte_tokenizer, path=path, strict=True)
    assert list((tmp_path / "prepared").iterdir()) == []
    prepare(tmp_path, byte_tokenizer, path=path)
    with pytest.raises(ValueError, match="data.strict"):  # also when the tokens were prepared before
        prepare(tmp_path, byte_tokenizer, path=path, strict=True)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "holds no rows"),
        ([{"messages": MULTI_TURN[:2]}], "no assistant turn"),
        ([{"q": "x"}], "data.prompt_column"),
    ],
)
def test_a_source_without_documents_says_why(tmp_path, byte_tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, byte_tokenizer, path=write_lines(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"path": ""}, ValueError, "data.path must name"),
        ({"path": "missing.jsonl"}, FileNotFoundError, "no file missing.jsonl"),
    ],
)
def test_check_source_says_what_is_missing(fields, error, message):
    with pytest.raises(error, match=message):
        check_source(SourceConfig(**fields))


def test_a_dataset_folder_is_read_by_the_datasets_library(tmp_path, byte_tokenizer):
    folder = tmp_path / "some_dataset"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": None}])
    check_source(SourceConfig(path=str(folder)))
    documents = prepare(tmp_path, byte_tokenizer, path=str(folder))
    assert (len(documents), documents.meta["malformed"]) == (1, 1)
    limited = prepare(tmp_path, byte_tokenizer, path=str(folder), limit=1)
    assert limited.meta["malformed"] == 0 and limited.folder != documents.folder


def test_the_split_and_subset_of_a_dataset_are_those_that_are_named(tmp_path, byte_tokenizer):
    folder = tmp_path / "some_dataset"
    folder.mkdir()
    configs = []
    for subset in ("easy", "hard"):
        files = {split: f"{subset}_{split}.jsonl" for split in ("train", "other")}
        for split, name in files.items():
            write_lines(folder / name, [{"prompt": "p", "response": f"{subset} {split}"}])
        configs += [f"- config_name: {subset}", "  data_files:"]
        configs += [line for split in files for line in (f"  - split: {split}", f"    path: {files[split]}")]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", ""]))
    for subset, split in (("easy", "train"), ("hard", "train"), ("hard", "other")):
        check_source(config := SourceConfig(path=str(folder), subset=subset, split=split))
        documents = Documents(prepare_documents(config, byte_tokenizer, str(tmp_path / "prepared"), 0))
        [(_, response)] = texts(documents, byte_tokenizer)
        assert response == f"{subset} {split}<|im_end|>\n"
    with pytest.raises(ValueError, match="data.split: .* has train, other, got 'validation'"):
        check_source(SourceConfig(path=str(folder), subset="hard", split="validation"))


def test_a_validation_set_may_be_another_split_of_the_same_dataset():
    config = DataConfig(path="owner/name", split="train", validation_path="owner/name", validation_split="test")
    assert (config.validation_source.path, config.validation_source.split) == ("owner/name", "test")


def test_the_cache_is_reused_until_something_that_decides_the_tokens_changes(tmp_path, byte_tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    first = prepare(tmp_path, byte_tokenizer, path=write_lines(path, [{"prompt": "p", "response": "r"}]))
    with monkeypatch.context() as patch:
        patch.setattr(documents_module, "_write", None)  # calling it would fail
        assert prepare(tmp_path, byte_tokenizer, path=str(path)).folder == first.folder
    changed = prepare(tmp_path, byte_tokenizer, path=write_lines(path, [{"prompt": "p", "response": "s"}]))
    assert changed.folder != first.folder and changed.folder.name.startswith("a-")


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        prepare(tmp_path, byte_tokenizer, path=write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}]))


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(
        byte_tokenizer, "chat_template", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="differently once"):
        render(MULTI_TURN, byte_tokenizer)


def test_tokenize_gives_each_conversation_its_own_segments(byte_tokenizer):
    segments = [[("ab", False), ("c", True)], [], [("d", True)]]
    tokens, is_response, lengths = tokenize(segments, byte_tokenizer)
    assert (byte_tokenizer.decode(tokens), is_response.tolist()) == ("abcd", [False, False, True, True])
    assert lengths.tolist() == [3, 0, 1]
    assert [len(part) for part in tokenize([], byte_tokenizer)] == [0, 0, 0]


def test_a_conversation_that_the_template_refuses_leaves_the_others(tmp_path, byte_tokenizer, monkeypatch):
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", refusing + byte_tokenizer.chat_template)
    rows = ["broken", *({"prompt": prompt, "response": "r"} for prompt in ("a", "no", "b")), "also broken"]
    documents = prepare(tmp_path, byte_tokenizer, path=write_lines(tmp_path / "a.jsonl", rows))
    assert [text.split()[1] for text, _ in texts(documents, byte_tokenizer)] == ["a<|im_end|>", "b<|im_end|>"]
    problems = documents.meta["problems"]
    assert [problem.split(":")[1] for problem in problems] == ["1", "3", "5"]
    assert problems[1].endswith("the chat template refuses it (not this)")


@pytest.mark.slow
def test_worker_processes_write_the_same_files(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(documents_module, "ROWS_PER_BATCH", 10)
    rows = [{"prompt": f"p{i}", "response": "r" * (i % 7 + 1)} for i in range(400)]
    path = write_lines(tmp_path / "a.jsonl", ["broken", *rows])
    alone = prepare(tmp_path / "alone", byte_tokenizer, path=path)
    together = prepare(tmp_path / "together", byte_tokenizer, path=path, num_workers=2)
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    np.testing.assert_array_equal(alone.offsets, together.offsets)
    assert alone.meta == together.meta


@pytest.mark.slow
def test_a_requeue_signal_to_all_processes_ends_no_worker_and_comes_through(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(documents_module, "ROWS_PER_BATCH", 10)
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    read_rows = documents_module.read_rows

    def signalled_rows(config):
        for place, row in read_rows(config):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGUSR1)  # from their start on
            yield place, row
        assert multiprocessing.active_children()
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(documents_module, "read_rows", signalled_rows)
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(400)]
    try:
        documents = prepare(tmp_path, byte_tokenizer, path=write_lines(tmp_path / "a.jsonl", rows), num_workers=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(documents) == 400 and received == [signal.SIGUSR1]


def test_the_prompt_template_wraps_the_first_user_turn_only():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    config = SourceConfig(path="x.jsonl", prompt_template="Question: {prompt}\nAnswer:")
    assert [turn["content"] for turn in parse_row(row, config)] == ["Question: a\nAnswer:", "b", "c", "d"]
    with pytest.raises(ValueError, match="must contain"):
        SourceConfig(prompt_template="Question:")


def test_rows_that_fit_no_column_are_found_before_anything_is_loaded(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "p", "answer": "r"}] * 3)
    with pytest.raises(ValueError, match="none of the first 3 rows .*'prompt'.*data.prompt_column"):
        check_source(SourceConfig(path=path))
    check_source(SourceConfig(path=path, prompt_column="question", response_column="answer"))


def test_a_validation_set_that_cannot_be_read_is_named_with_the_way_out(tmp_path):
    own = write_lines(tmp_path / "own.jsonl", [{"question": "p", "answer": "r"}] * 3)
    other = write_lines(tmp_path / "other.jsonl", [{"prompt": "p", "response": "r"}] * 3)
    columns = {"prompt_column": "question", "response_column": "answer"}
    with pytest.raises(ValueError, match=r"^data.validation_path: none .*: --data.validation_path \"\"\.$"):
        DataConfig(path=own, validation_path=other, **columns).check_sources()
    with pytest.raises(FileNotFoundError, match=r"^data.validation_path: no file absent.jsonl"):
        DataConfig(path=own, validation_path="absent.jsonl", **columns).check_sources()
    DataConfig(path=own, **columns).check_sources()
