"""Does a server lose a request, or mix two up, when hundreds come at once?

    python benchmarks/load_server.py [--requests 500]

Starts `python -m fastdllm serve` on a free port of the loopback and asks it everything at once, through the openai
client: different problems, in blocks and token by token, greedy and drawn, whole and in a stream. Some clients hang up
after the first piece. Every answer is compared with the one that an engine gives to that request alone. Exits 1 if one
is lost or different, or if a slot is still taken at the end.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import openai

from fastdllm.cli import run
from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine, Request
from fastdllm.decoding.text import TextGenerator, chat_prompt, load
from fastdllm.runtime import code_revision, device_name, write_text

ROOT = Path(__file__).parents[1]
WAYS: tuple[dict, ...] = ({}, {"threshold": 0.6}, {"mode": "ar"}, {"temperature": 0.7, "threshold": 0.8})
MAX_NEW_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Ask a server hundreds of things at once, and compare each answer with the engine's own."""

    checkpoint: str = "data/tiny-adapted"
    """What is served."""
    requests: int = 500
    """Asked at once; problems repeat after 400, in another way each time."""
    dropped: int = 20
    """Further streams that the client leaves after the first piece."""
    output: str = ""
    """File for the result as JSON; none if empty."""


@dataclass(frozen=True)
class Question:
    """A request as the client sends it."""

    number: int
    problem: str

    @property
    def way(self) -> dict:
        return WAYS[(self.number + self.number // 400) % len(WAYS)]

    @property
    def is_streamed(self) -> bool:
        return self.number // len(WAYS) % 2 == 0

    def fields(self, model: str) -> dict:
        """Return what the client's `create` is given."""
        own = {name: value for name, value in self.way.items() if name != "temperature"}
        return {
            "model": model,
            "messages": [{"role": "user", "content": self.problem}],
            "max_tokens": MAX_NEW_TOKENS,
            "temperature": self.way.get("temperature", 0),
            "seed": self.number,
            "extra_body": own,
        }


@dataclass
class Tally:
    """What became of the questions."""

    requests: int = 0
    streamed: int = 0
    answered: int = 0
    lost: int = 0
    different: int = 0
    dropped: int = 0
    still_running: int = 0
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)


def make_questions(count: int) -> list[Question]:
    """Return problems of the bundled task, each in several ways."""
    files = ("data/tiny/test.jsonl", "data/tiny/validation.jsonl")
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    problems = [json.loads(line)["prompt"] for line in lines]
    return [Question(number, problems[number % len(problems)]) for number in range(count)]


def own_answers(source: TextGenerator, questions: list[Question]) -> list[tuple[str, int]]:
    """Return what an engine answers to each question alone, and in how many tokens."""
    engines, answers = {}, []
    for question in questions:
        way = dict(question.way)
        mode, key = way.pop("mode", source.mode), json.dumps(question.way)
        if key not in engines:
            base = DecodeConfig() if mode == "ar" else source.decode
            decode = DecodeConfig(**asdict(base) | way)
            engines[key] = Engine(source.model, source.tokenizer, mode=mode, decode=decode, batch_size=1)
        prompt = chat_prompt(source.tokenizer, [{"role": "user", "content": question.problem}])
        request = Request(prompt=prompt, max_new_tokens=MAX_NEW_TOKENS, seed=question.number)
        (completion,) = engines[key].run([request])
        answers.append((completion.text, completion.counted_tokens))
    return answers


async def ask_all(
    client: openai.AsyncOpenAI, model: str, questions: list[Question], expected: list[tuple[str, int]], dropped: int
) -> Tally:
    """Ask everything at once and return what came of it."""
    tally = Tally(requests=len(questions), streamed=sum(question.is_streamed for question in questions))
    started = time.perf_counter()

    async def ask(question: Question, answer: tuple[str, int]) -> None:
        try:
            found = await _ask(client, question, model)
        except openai.OpenAIError as error:
            print(f"question {question.number} was lost: {error}", flush=True)
            tally.lost += 1
            return
        tally.answered += 1
        tally.tokens += found[1]
        tally.latencies.append(time.perf_counter() - started)
        if found != answer:
            print(f"question {question.number} has another answer:\n  {found}\n  {answer}", flush=True)
            tally.different += 1

    async def drop(question: Question) -> None:
        stream = await client.chat.completions.create(stream=True, **question.fields(model))
        await anext(aiter(stream))
        await stream.close()
        tally.dropped += 1

    pairs = zip(questions, expected, strict=True)
    await asyncio.gather(*(ask(*pair) for pair in pairs), *(drop(question) for question in questions[:dropped]))
    tally.seconds = time.perf_counter() - started
    tally.still_running = await _still_running(client)
    return tally


async def ask_server(url: str, *arguments, api_key: str = "none") -> Tally:
    """As ask_all, with a client of its own."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=600) as client:
        return await ask_all(client, *arguments)


async def _ask(client: openai.AsyncOpenAI, question: Question, model: str) -> tuple[str, int]:
    fields = question.fields(model)
    if not question.is_streamed:
        whole = await client.chat.completions.create(**fields)
        return whole.choices[0].message.content, whole.usage.completion_tokens
    text, tokens = "", 0
    async for chunk in await client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **fields
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


async def _still_running(client: openai.AsyncOpenAI) -> int:
    """Return how many slots are taken when nobody asks any more; a moment is given for those that hung up last."""
    for _ in range(50):
        state = await client.get("../health", cast_to=dict)
        if not state["running"] + state["waiting"]:
            return 0
        await asyncio.sleep(0.1)
    return state["running"] + state["waiting"]


def load_server(config: LoadConfig) -> Tally:
    """Start a server, ask it, print the result as JSON."""
    source, questions = load(config.checkpoint), make_questions(config.requests)
    expected = own_answers(source, questions)
    command = [sys.executable, "-m", "fastdllm", "serve", "--checkpoint", config.checkpoint, "--port", "0"]
    command += ["--max_waiting", str(config.requests + config.dropped), "--name", "served"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split(" at ")[1].split("/v1")[0]
            tally = asyncio.run(ask_server(url, "served", questions, expected, config.dropped))
        finally:
            server.terminate()
    report(config, source, tally)
    if tally.lost or tally.different or tally.still_running:
        sys.exit(1)
    return tally


def report(config: LoadConfig, source: TextGenerator, tally: Tally) -> None:
    """Print the result, and write it where it is asked for."""
    counts = asdict(tally)
    times = sorted(counts.pop("latencies"))
    revision, is_dirty = code_revision()
    result = counts | {
        "seconds": round(tally.seconds, 2),
        "tokens_per_second": round(tally.tokens / tally.seconds, 1),
        "median_seconds": round(statistics.median(times), 2),
        "slowest_seconds": round(times[-1], 2),
        "device": device_name(source.model.device),
        "dtype": str(source.model.dtype).removeprefix("torch."),
        "revision": revision,
        "is_dirty": is_dirty,
    }
    print(json.dumps(result))
    if config.output:
        write_text(Path(config.output), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(LoadConfig, load_server)
