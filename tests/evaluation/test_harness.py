from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.evaluation import harness
from fastdllm.evaluation.arguments import parse_arguments
from fastdllm.evaluation.baseline import TransformersEngine
from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.harness import FastDLLMv2, published_prompt, run_task
from fastdllm.evaluation.likelihood import masked_row
from fastdllm.evaluation.results import describe_decoding
from fastdllm.evaluation.run import evaluate
from fastdllm.evaluation.tasks import load_task

ROOT = Path(__file__).resolve().parents[2]


def model(path, **arguments):
    return FastDLLMv2(checkpoint=load_checkpoint(path), device="cpu", **arguments)


def instance(kind, *arguments, task="toy"):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))


def test_published_prompt_replaces_every_cue_of_its_task_only():
    instruction = r"Please reason step by step, and put your final answer within \boxed{{}}."
    assert published_prompt("gsm8k", "Q\nAnswer: Answer:") == f"Q\n{instruction} {instruction}"
    assert published_prompt("gsm8k_cot", "Answer:") == instruction
    assert published_prompt("minerva_math_algebra", "Solution: Answer:") == f"{instruction} Answer:"
    assert published_prompt("tiny_problems", "Answer: Solution:") == "Answer: Solution:"


def test_prompt_lm_eval_leaves_the_cue(adapted):
    request = instance("generate_until", "Answer:", {"until": []}, task="gsm8k")
    edited, left = (model(adapted, prompt=prompt)._request(0, request) for prompt in ("published", "lm_eval"))
    assert len(edited.prompt) > len(left.prompt) == len("Answer:")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bd_size": 16}, "bd_size must be the block size.*32.*got 16"),
        ({"mask_id": 5}, "mask_id must be"),
        ({"treshold": 0.5}, "did you mean threshold"),
        ({"engine": "transformers"}, "mode ar only"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_arguments_that_contradict_the_checkpoint_are_errors(adapted, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(adapted, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"schedule": "adaptive"}, "schedule adaptive needs reuse_mode delta or attn, got output"),
        ({"budget": 0.1}, "budget 0.1 does nothing in schedule fixed"),
        ({"active_rows": "needed", "reuse_k": 2}, "do not go together"),
        ({"schedule": "sometimes"}, "schedule must be one of fixed, adaptive"),
        ({"sub_block_size": 0}, "did you mean small_block_size"),
        ({"small_block_size": 0}, "sub_block_size must be 1 or more"),
    ],
)
def test_what_reuse_and_unmasking_refuse_is_refused_before_the_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        FastDLLMv2(model_path="not/there", device="cpu", **arguments)


def test_every_reuse_option_reaches_the_engine_from_lm_evals_arguments(adapted):
    adaptive = model(
        adapted, schedule="adaptive", budget="0.2", layer_subset="1", reuse_mode="delta", use_block_cache=True
    )
    reuse = adaptive._engine().reuse
    assert (reuse.schedule, reuse.budget, reuse.subset, reuse.reuse_mode) == ("adaptive", 0.2, "1", "delta")
    assert model(adapted, active_rows="needed", use_block_cache=True)._engine().reuse.is_trimmed


def test_every_option_of_unmasking_reaches_the_engine_from_lm_evals_arguments(adapted):
    options = dict(threshold=0.6, use_block_cache=True, fuse_append=True, temperature=0.5, top_p=0.75)
    engine = model(adapted, small_block_size="16", batch_size="3", **options)._engine()
    assert (engine.decode, engine.batch_size) == (DecodeConfig(sub_block_size=16, **options), 3)
    other = model(adapted, policy="factor", policy_parameter="0.25")._engine()
    assert (other.decode.policy, other.decode.parameter) == ("factor", 0.25)
    outside = model(adapted, mode="ar", engine="transformers", batch_size=3)._engine()
    assert (type(outside), outside.batch_size) == (TransformersEngine, 3)


def test_published_arguments_of_the_checkpoint_are_accepted(adapted):
    lm = model(adapted, bd_size=32, mask_id=load_checkpoint(adapted).mask_token_id, layer_subset="first", reuse_k=1)
    assert lm.mode == "diffusion" and lm.tokenizer_name and lm.chat_template(True)


def test_seed_speed_and_name_of_an_experiment_do_what_they_say(adapted, capsys):
    lm = model(adapted, seed=5, show_speed=True, experiment_name="try 1", max_new_tokens=3)
    requests = [instance("generate_until", "one two", {"until": []})]
    assert [lm._request(number, requests[0]).seed for number in (0, 2)] == [5, 7]
    assert lm.get_model_info()["experiment_name"] == "try 1"
    lm.generate_until(requests, disable_tqdm=True)
    assert " tokens/s" in capsys.readouterr().out
    quiet = model(adapted, max_new_tokens=3)
    quiet.generate_until(requests, disable_tqdm=True)
    assert " tokens/s" not in capsys.readouterr().out


def test_a_diffusion_model_is_needed_for_diffusion(plain):
    assert model(plain).mode == "ar"
    with pytest.raises(ValueError, match="needs an adapted checkpoint"):
        model(plain, mode="diffusion")


def test_length_is_the_least_of_task_and_model_and_stop_strings_end_the_text(adapted):
    requests = [instance("generate_until", "one two", {"until": [], "max_gen_toks": 5})]
    lm = model(adapted, max_new_tokens=9)
    text = lm.generate_until(requests, disable_tqdm=True)[0]
    assert lm.completions["toy", 0].counted_tokens <= 5
    stopped = model(adapted).generate_until(
        [instance("generate_until", "one two", {"until": [text[2]], "max_gen_toks": 5})], disable_tqdm=True
    )
    assert stopped == [text.split(text[2])[0]]
    assert model(adapted, max_new_tokens=3)._request(0, requests[0]).max_new_tokens == 3


@pytest.mark.parametrize("mode, engine", [("diffusion", "fastdllm"), ("ar", "fastdllm"), ("ar", "transformers")])
def test_a_few_requests_are_answered_outside_the_timing_first(adapted, monkeypatch, mode, engine):
    lm, runs = model(adapted, mode=mode, engine=engine, batch_size=8, max_new_tokens=40), []

    class Clock:  # an engine that notes what it is asked, and says that it took a second for each request
        def __init__(self):
            self.seconds, self.decode_seconds = 0.0, None
            self.engine = own_engine()

        def run(self, requests, skip=()):
            runs.append([request.max_new_tokens for request in requests])
            self.seconds += len(requests)
            yield from self.engine.run(requests, skip)

        def free(self):
            self.engine.free()

    own_engine = lm._engine
    monkeypatch.setattr(lm, "_engine", Clock)
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, {"until": []}), idx=0, metadata=("toy", n, 1))
        for n, text in enumerate("abcdef")
    ]
    lm.generate_until(requests, disable_tqdm=True)
    assert runs == [[32] * 4, [40] * 6] and lm.seconds == 6 and len(lm.completions) == 6


def test_scoring_is_warmed_up_outside_the_timing(plain, monkeypatch):
    lm, sizes, score = model(plain, batch_size=8), [], FastDLLMv2._score
    monkeypatch.setattr(lm, "_score", lambda pairs: sizes.append((len(pairs), lm.seconds)) or score(lm, pairs))
    lm.loglikelihood([instance("loglikelihood", "context", letter) for letter in "abcdef"], disable_tqdm=True)
    assert sizes == [(4, 0.0), (6, 0.0)] and lm.seconds > 0


def test_sampling_tasks_and_unknown_options_are_errors(adapted):
    for options, message in (({"do_sample": True}, "decoder is greedy"), ({"num_beams": 4}, "asks for num_beams")):
        with pytest.raises(ValueError, match=message):
            model(adapted).generate_until([instance("generate_until", "x", options)])


@pytest.mark.parametrize(
    "option",
    [
        {"reuse_k": 2, "use_block_cache": True},
        {"policy": "fixed"},
        {"draft_length": 4, "policy": "verified"},
        {"threshold": 0.8},
        {"fuse_append": True},
        {"small_block_size": 16},
        {"use_block_cache": True},
        {"temperature": 0.5},
        {"max_new_tokens": 7},
        {"seed": 3},
        {"active_rows": "needed", "use_block_cache": True},
    ],
)
def test_log_likelihood_refuses_what_only_decoding_reads_before_the_model_runs(adapted, option, monkeypatch):
    lm = model(adapted, **option)
    monkeypatch.setattr(lm.model, "hidden_states", None)  # a call would be a TypeError
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"cannot exercise.*{name} {value}"):
        lm.loglikelihood([instance("loglikelihood", "a", "b")])


def test_masked_row_ends_at_a_block_with_one_end_token_in_it():
    assert masked_row([1, 2], [3], 4, 9, 7) == [1, 2, 9, 7]
    assert masked_row([1, 2, 3], [4], 4, 9, 7) == [1, 2, 3, 9, 7, 9, 9, 9]  # aligned: a whole block more
    assert masked_row([1], [4, 5], 8, 9, 7) == [1, 9, 5, 7, 9, 9, 9, 9]


@pytest.mark.parametrize("end", ["", " \n"], ids=["bare", "behind white space"])
def test_masked_likelihood_is_that_of_one_plain_block_causal_pass(adapted, end):
    lm = model(adapted)
    text = f"a question of forty letters, more or less:{end}"
    ((score, is_greedy),) = lm.loglikelihood([instance("loglikelihood", text, "B")])
    context = lm.tok_encode(text)
    target = lm.tok_encode("B")
    row = masked_row(context, target, 32, lm.model.mask_token_id, lm.eot_token_id)
    block = torch.arange(len(row)) // 32
    attention_mask = (block[:, None] >= block[None])[None, None]
    hidden = lm.model.hidden_states(torch.tensor([row]), torch.arange(len(row))[None], attention_mask)
    expected = lm.model.qwen.lm_head(hidden)[0, len(context) - 1].log_softmax(-1)[target[0]]
    assert score == pytest.approx(expected.item(), abs=1e-5) and not is_greedy


def test_answers_that_the_published_likelihood_cannot_tell_apart_are_refused(adapted, plain):
    requests = [instance("loglikelihood", "context\n", answer) for answer in ("(A)", "(B)")]
    with pytest.raises(ValueError, match=r"first token.*'\(A\)' and '\(B\)' begin with the same one; use mode ar"):
        model(adapted).loglikelihood(requests)
    assert len(model(plain).loglikelihood(requests)) == 2


def test_autoregressive_likelihood_is_exact(plain):
    lm = model(plain)
    requests = [instance("loglikelihood", "some context", " and more"), instance("loglikelihood", "x", "y")]
    scores = lm.loglikelihood(requests)
    for (score, is_greedy), request in zip(scores, requests, strict=True):
        context, whole = (lm.tok_encode(text) for text in (request.args[0], "".join(request.args)))
        qwen = load_checkpoint(plain).qwen
        log_probability = qwen(torch.tensor([whole])).logits[0].log_softmax(-1)
        target = range(len(context), len(whole))
        assert score == pytest.approx(sum(log_probability[i - 1, whole[i]].item() for i in target), abs=1e-4)
        assert is_greedy == all(log_probability[i - 1].argmax() == whole[i] for i in target)


def test_a_likelihood_task_gives_a_row_without_passes_that_says_which_likelihood(adapted, plain, capsys):
    row = evaluate(EvaluateConfig(task="toy_letters", limit=2, checkpoint=adapted))[0]
    assert row["metric"] == "acc,none" and row["num_samples"] == 2 and row["seconds"] > 0
    assert row["counted_tokens"] is None and row["tokens_per_forward"] is None
    assert row["likelihood"] == "first token, published form"
    assert capsys.readouterr().out.count("log-likelihood: first token, published form") == 1
    assert describe_decoding(row) == "log-likelihood, first token, published form"
    assert evaluate(EvaluateConfig(task="toy_letters", limit=2, checkpoint=plain))[0]["likelihood"] == "exact"
    assert evaluate(EvaluateConfig(task="toy_problems", limit=1, checkpoint=plain))[0]["likelihood"] is None


@pytest.mark.parametrize(
    "option, message",
    [
        ({"reuse_k": 2}, "reuse_k 2"),
        ({"threshold": 0.7}, "threshold 0.7"),
        ({"decode": DecodeConfig(policy="fixed", fuse_append=True)}, "decode.policy fixed, decode.fuse_append True"),
        ({"decode": DecodeConfig(sub_block_size=16)}, "decode.sub_block_size 16"),
        ({"decode": DecodeConfig(use_block_cache=False)}, "decode.use_block_cache False"),
        ({"decode": DecodeConfig(temperature=0.5)}, "decode.temperature 0.5"),
        (
            {"checkpoint": "plain", "engine": "transformers", "max_new_tokens": 9},
            "engine transformers, max_new_tokens 9",
        ),
    ],
)
def test_evaluate_refuses_them_before_the_model_is_there(adapted, plain, option, message, monkeypatch):
    monkeypatch.setattr(harness, "FastDLLMv2", None)
    with pytest.raises(ValueError, match=f"log-likelihood task.*cannot exercise {message}"):
        evaluate(EvaluateConfig(**{"task": "toy_letters", "checkpoint": adapted, **option}))


def test_gsm8k_runs_from_local_files_without_a_network(adapted, offline, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    result = run_task(model(adapted, max_new_tokens=4), load_task("gsm8k", offline), limit=2)
    assert result.metric == "exact_match,flexible-extract" and len(result.problems) == 2
    assert "Please reason step by step" in result.problems[0]["prompt"]
    assert result.problems[0]["prompt"].count("Question:") == 1  # 0-shot


def test_options_of_blocks_are_refused_with_policy_verified():
    arguments = parse_arguments({"policy": "verified", "draft_length": 6, "draft_groups": "0+3"})
    assert arguments.decode.draft_plan == (6, (0, 3)) and arguments.decode.is_verified
    for name, value in (("use_block_cache", True), ("small_block_size", 4)):
        with pytest.raises(ValueError, match=f"model argument {name} does nothing with policy verified"):
            parse_arguments({"policy": "verified", name: value})
