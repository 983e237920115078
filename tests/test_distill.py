"""Answers as training data: resumable, the same in any batch, filtered as asked, readable as a training source."""

import gzip
import json

import pytest

from fastdllm import distill
from fastdllm.data.sources import SourceConfig, parse_row
from fastdllm.decoding.engine import Engine

NOT_SHOWN = {"role": "assistant", "content": "not shown to the model"}
with open("data/tiny/test.jsonl") as file:
    PROBLEMS = [json.loads(next(file)) for _ in range(3)]
ROWS = [
    {"messages": [{"role": "user", "content": p["prompt"]}, NOT_SHOWN], "source": "made", "answer": p["answer"]}
    for p in PROBLEMS
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "not JSON\n")
    return SourceConfig(path=str(path))


def make_config(tmp_path, prompts, name="out.jsonl", **changes):
    options = dict(checkpoint="data/tiny", data=prompts, max_new_tokens=60, temperature=0.0, device="cpu") | changes
    return distill.DistillConfig(output=str(tmp_path / name), **options)


def read(path):
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_right_answers_become_training_rows_with_their_origin(tmp_path, prompts, capsys):
    distill.distill(make_config(tmp_path, prompts, "out.jsonl.gz", keep="right"))
    rows = read(tmp_path / "out.jsonl.gz")
    assert [row["answer"] for row in rows] == [row["answer"] for row in ROWS]
    for row, given in zip(rows, ROWS, strict=True):
        assert row["messages"][:1] == given["messages"][:1] and "not shown" not in json.dumps(row)
        assert row["messages"][1]["content"].endswith(f"#### {row['answer']}")
        assert parse_row(row, SourceConfig()) == row["messages"]
    provenance = rows[1]["provenance"]
    assert provenance["model"] == "data/tiny" and provenance["sample"] == 0 and provenance["prompt"].endswith(":2")
    assert {"checkpoint_hash", "revision", "temperature", "top_p", "seed", "max_new_tokens"} <= provenance.keys()
    assert "3 answers to 3 prompts; 1 malformed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial*"))


def test_wrong_cut_and_repeated_answers_are_left_out_and_counted(tmp_path, prompts, capsys):
    wrong = [dict(row, answer="500") for row in ROWS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    distill.distill(make_config(tmp_path, prompts, keep="right"))
    assert "0 answers to 3 prompts" in (out := capsys.readouterr().out) and "3 wrong" in out
    distill.distill(make_config(tmp_path, prompts, max_new_tokens=5))
    assert "3 cut off" in capsys.readouterr().out and read(tmp_path / "out.jsonl") == []
    distill.distill(make_config(tmp_path, prompts, samples=3, temperature=0.01, top_p=0.5))
    assert "3 answers to 3 prompts; 0 malformed, 6 repeated" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 4])
def test_broken_off_and_begun_again_it_writes_what_an_unbroken_call_does(tmp_path, prompts, monkeypatch, batch_size):
    options = dict(samples=4, temperature=4.0, top_p=1.0)
    distill.distill(make_config(tmp_path, prompts, "whole.jsonl", batch_size=6, **options))
    run, asked = Engine.run, []

    def run_some(engine, requests):
        asked.append(len(requests))
        for number, completion in enumerate(run(engine, requests)):
            if number == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield completion

    monkeypatch.setattr(Engine, "run", run_some)
    broken = make_config(tmp_path, prompts, batch_size=batch_size, **options)
    with pytest.raises(KeyboardInterrupt):
        distill.distill(broken)
    distill.distill(broken)
    assert asked == [12, 7]
    whole, ours = read(tmp_path / "whole.jsonl"), read(tmp_path / "out.jsonl")
    assert ours == whole and len({row["messages"][-1]["content"] for row in whole}) > 3


def test_every_answer_has_its_own_seed_and_another_config_s_seed_has_others(tmp_path, prompts, monkeypatch):
    asked = []

    def run_none(engine, requests):
        asked.extend(request.seed for request in requests)
        assert (engine.batch_size, engine.decode.temperature, engine.decode.top_p) == (7, 1.5, 0.75)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run", run_none)
    options = dict(samples=2, temperature=1.5, top_p=0.75, batch_size=7)
    for seed in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            distill.distill(make_config(tmp_path, prompts, seed=seed, **options))
    assert sorted(asked) == [0, 1, 2, 3, 4, 5, *range(12, 18)]  # (seed x 3 prompts + prompt) x 2 samples + sample


def test_answers_to_prompts_that_were_changed_since_are_not_taken(tmp_path, prompts, monkeypatch):
    run = Engine.run

    def run_some(engine, requests):
        for number, completion in enumerate(run(engine, requests)):
            if number == 2:
                raise KeyboardInterrupt
            yield completion

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", run_some)
        with pytest.raises(KeyboardInterrupt):
            distill.distill(make_config(tmp_path, prompts))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    distill.distill(make_config(tmp_path, prompts, batch_size=2))
    rows = read(tmp_path / "out.jsonl")
    assert [row["messages"][0] for row in rows] == [row["messages"][0] for row in ROWS[::-1]]
    assert all(row["messages"][1]["content"].endswith(f"#### {row['answer']}") for row in rows)


def test_what_cannot_be_done_is_refused(tmp_path, prompts):
    with pytest.raises(ValueError, match="samples 2 at temperature 0 would all be the same"):
        make_config(tmp_path, prompts, samples=2)
    with pytest.raises(ValueError, match="output must end in .jsonl"):
        make_config(tmp_path, prompts, "out.txt")
    with pytest.raises(ValueError, match="keep right needs rows with a right answer in column 'gold'"):
        distill.distill(make_config(tmp_path, prompts, keep="right", answer_column="gold"))
    (tmp_path / "prompts.jsonl").write_text('{"text": "no prompt"}\n')
    with pytest.raises(ValueError, match="none of the first 1 rows"):
        distill.distill(make_config(tmp_path, prompts))


@pytest.mark.parametrize(
    ("answer", "text", "is_equal"),
    [
        ("72", "She sold 72 clips.\n#### 72", True),
        ("72", "so it is \\boxed{72}", True),
        ("\\frac{1}{2}", "hence $\\boxed{0.5}$", True),
        ("1,000", "#### 1000", True),
        ("72", "#### 71", False),
        ("72", "no number", False),
    ],
)
def test_answers_are_equal_by_value(answer, text, is_equal):
    assert distill.is_equal(answer, text) == is_equal


def test_many_answers_are_judged_alike_in_several_processes(monkeypatch):
    pairs = [(str(number), f"so it is {number + number % 3}") for number in range(9)]
    alone = distill.judge(pairs)
    monkeypatch.setattr(distill, "JUDGED_ALONE", 0)
    assert distill.judge(pairs) == alone == [number % 3 == 0 for number in range(9)]
