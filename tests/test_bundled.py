"""The bundled models: small, loadable, and as good as the README says, on a part of their problems."""

import json
from pathlib import Path

import pytest

from fastdllm.checkpoint import load_checkpoint
from fastdllm.decoding.engine import DecodeConfig, Engine, Request

DATA = Path(__file__).parent.parent / "data"
PROBLEMS = [json.loads(line) for line in (DATA / "tiny" / "test.jsonl").read_text().splitlines()][:40]


def answers(folder, mode, **decode):
    checkpoint = load_checkpoint(str(DATA / folder))
    tokenizer = checkpoint.tokenizer
    prompts = [[{"role": "user", "content": problem["prompt"]}] for problem in PROBLEMS]
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    requests = [Request(prompt=tokenizer(t, add_special_tokens=False).input_ids, max_new_tokens=128) for t in texts]
    engine = Engine(checkpoint.model(), tokenizer, mode=mode, decode=DecodeConfig(**decode), batch_size=40)
    completions = sorted(engine.run(requests), key=lambda completion: completion.index)
    right = [
        completion.text.endswith(f"#### {problem['answer']}")
        for completion, problem in zip(completions, PROBLEMS, strict=True)
    ]
    passes = sum(completion.denoise_passes + completion.append_passes for completion in completions)
    return sum(right) / len(right), sum(completion.counted_tokens for completion in completions) / passes


def test_both_bundled_models_fit_into_eight_megabytes():
    sizes = [path.stat().st_size for name in ("tiny", "tiny-adapted") for path in (DATA / name).rglob("*")]
    assert sum(sizes) <= 8e6


def test_the_autoregressive_model_answers_new_numbers_and_new_forms():
    accuracy, tokens_per_forward = answers("tiny", "ar")
    assert accuracy >= 0.85 and tokens_per_forward == 1.0


@pytest.mark.slow
def test_the_adapted_model_keeps_the_accuracy_in_a_fraction_of_the_passes():
    accuracy, tokens_per_forward = answers("tiny-adapted", "diffusion", threshold=0.9)
    assert accuracy >= 0.9 and tokens_per_forward >= 2
    (path,) = (DATA / "tiny-adapted" / "rows").glob("tiny-adapted-tiny_problems-k1-device*.json")
    row = json.loads(path.read_text())  # of all 200 problems; these are the first 40
    assert abs(accuracy - row["accuracy"]) <= 0.1
    assert abs(tokens_per_forward - row["tokens_per_forward"]) <= 0.5
