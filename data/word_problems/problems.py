"""Generated grade-school word problems: a problem is a function of (seed, index, split) alone.

`python data/word_problems/problems.py --output data/tiny-source` writes train.jsonl, validation.jsonl, test.jsonl and a
freshly initialised checkpoint folder `fresh/`. Numbers are split by a hash of (form, numbers) that does not depend on
the seed, so no training problem of any seed has the numbers of a validation or test problem of its form.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fresh import fresh_checkpoint, train_tokenizer  # beside this file
from stories import (
    CONTAINERS,
    EVENTS,
    FAMILIES,
    FOODS,
    HELD_OUT_FORMS,
    NAMES,
    OBJECTS,
    OPENINGS,
    SHE,
    TRAINED_FORMS,
    VEHICLES,
    Event,
)

from fastdllm.cli import run
from fastdllm.runtime import write_text

Split = Literal["train", "validation", "test"]
Numbers = dict[str, int]
MOST_DRAWS = 2_000  # listed forms need far fewer
TWO_CALCULATIONS = ("add_product", "subtract_product", "add_larger", "add_smaller")
LARGEST = 50  # of any count in a story; small enough for a model of 1.6M parameters to learn the arithmetic


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig:
    """Which problems are written, and where."""

    output: str = "data/tiny-source"
    """Folder that receives train.jsonl, validation.jsonl, test.jsonl and fresh/."""
    num_train: int = 120_000
    """Training problems, at least 1."""
    num_validation: int = 200
    """Validation problems, at least 0: trained forms with numbers of their own."""
    num_test: int = 200
    """Test problems, at least 0: four fifths trained forms with numbers of their own, one fifth held-out forms."""
    vocab_size: int = 640
    """Most entries of the tokenizer, special tokens included; at least 260."""
    seed: int = 0
    """Of the problems and of the initial weights, 0 or more."""

    def __post_init__(self) -> None:
        if self.num_train < 1 or min(self.num_validation, self.num_test, self.seed) < 0:
            counts = (self.num_train, self.num_validation, self.num_test, self.seed)
            raise ValueError(
                "num_train must be at least 1; num_validation, num_test and seed at least 0; "
                f"got num_train, num_validation, num_test, seed = {counts}."
            )


def problem(seed: int, index: int, split: Split) -> dict[str, str]:
    """Return problem `index` of a split: prompt, response, answer, form, and split ("numbers" or "forms").

    "split" says how the problem differs from training: other numbers, or a form never trained on. In the test split
    every fifth problem is of a held-out form.
    """
    is_held_out = split == "test" and index % 5 == 4
    forms = HELD_OUT_FORMS if is_held_out else TRAINED_FORMS
    round_robin = {"train": index // 2, "validation": index, "test": index - index // 5}[split]
    round_robin = index // 5 if is_held_out else round_robin
    form = forms[round_robin % len(forms)]
    rng = random.Random(f"{seed} {split} {index}")
    numbers = None
    while numbers is None:
        if split == "train" and index % 2:
            form = composed_form(rng)
        events = [OPENINGS[name] if position == 0 else EVENTS[name] for position, name in enumerate(form.split())]
        numbers = _draw_story(rng, form, events, split)
    prompt, response = _tell(rng, events, numbers)
    answer = str(numbers[-1]["r"])
    kind = "forms" if is_held_out else "numbers"
    return {"prompt": prompt, "response": f"{response}\n#### {answer}", "answer": answer, "form": form, "split": kind}


def composed_form(rng: random.Random) -> str:
    """Return a random form of 2 to 5 calculations that does not begin as a held-out form does."""
    while True:
        openings, between, endings = rng.choice(FAMILIES)
        names = [rng.choice(openings), *rng.choices(between, k=rng.randint(1, 3)), rng.choice(endings)]
        form = " ".join(name for name in names if name)
        operations = [(OPENINGS | EVENTS)[name].operation for name in form.split()]
        num_calculations = sum(0 if name == "start" else 1 + (name in TWO_CALCULATIONS) for name in operations)
        if 2 <= num_calculations <= 5 and not any(form.startswith(held_out) for held_out in HELD_OUT_FORMS):
            return form


def number_split(form: str, numbers: list[Numbers]) -> Split:
    """Return the split that a form's numbers belong to: a tenth is test, a tenth validation, the rest train."""
    drawn = [[numbers_of_event.get(key, 0) for key in "abk"] for numbers_of_event in numbers]
    bucket = zlib.crc32(f"{form} {drawn}".encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _draw_story(rng: random.Random, form: str, events: list[Event], split: Split) -> list[Numbers] | None:
    """Return the numbers of each event: drawn anew until every operation fits and the hash falls into the split.

    None says that no numbers were found in many draws: some composed forms have hardly any.
    """
    for _ in range(MOST_DRAWS):
        numbers, count = [], 0
        for event in events:
            drawn = OPERATIONS[event.operation](rng, count)
            if drawn is None or not 2 <= drawn["r"] <= LARGEST:
                break
            numbers.append({"n": count, **drawn})
            count = drawn["r"]
        if len(numbers) == len(events) and number_split(form, numbers) == split:
            return numbers
    return None


def _tell(rng: random.Random, events: list[Event], numbers: list[Numbers]) -> tuple[str, str]:
    """Return the problem's text and the worked answer without its last line."""
    people = rng.sample(NAMES, len(events) + 1)
    objects = rng.choice(OBJECTS)
    pronoun = "she" if people[0] in SHE else "he"
    words = {"P": people[0], "S": pronoun.capitalize(), "s": pronoun, "o": objects}
    words["c"] = rng.choice(VEHICLES if "people" in events[0].prompt else CONTAINERS)
    prompt, response, question = [], [], ""
    for event, drawn, other in zip(events, numbers, people[1:], strict=True):
        verbs = event.verbs if objects in FOODS else [verb for verb in event.verbs if verb != "eats"]
        values = {**words, **drawn, "Q": other, "v": rng.choice(verbs)}
        prompt.append(event.prompt.format(**values))
        response.append(event.answer.format(**values))
        question = event.question.format(**values) or question
        if event.subject:
            words["S"] = words["s"] = event.subject.format(**values)
    return " ".join([*prompt, question]), " ".join(response)


def _start(rng: random.Random, count: int) -> Numbers:
    first = rng.randint(4, 20)
    return {"a": first, "r": first}


def _sum(rng: random.Random, count: int) -> Numbers:
    first, second = rng.randint(3, 20), rng.randint(2, 20)
    return {"a": first, "b": second, "r": first + second}


def _difference(rng: random.Random, count: int) -> Numbers:
    first, second = rng.randint(6, 20), rng.randint(2, 12)
    return {"a": first, "b": second, "r": first - second}


def _product(rng: random.Random, count: int) -> Numbers:
    times, size = rng.randint(2, 5), rng.randint(2, 9)
    return {"k": times, "a": size, "r": times * size}


def _add(rng: random.Random, count: int) -> Numbers:
    change = rng.randint(2, 20)
    return {"a": change, "r": count + change}


def _subtract(rng: random.Random, count: int) -> Numbers:
    change = rng.randint(2, 20)
    return {"a": change, "r": count - change}


def _double(rng: random.Random, count: int) -> Numbers | None:
    return {"r": count * 2} if count <= 20 else None


def _halve(rng: random.Random, count: int) -> Numbers | None:
    return {"r": count // 2} if count % 2 == 0 and count <= 40 else None


def _divide(rng: random.Random, count: int) -> Numbers | None:
    divisors = [divisor for divisor in range(2, 6) if count % divisor == 0 and count <= 9 * divisor]
    if not divisors:
        return None
    divisor = rng.choice(divisors)
    return {"k": divisor, "r": count // divisor}


def _multiply(rng: random.Random, count: int) -> Numbers | None:
    price = rng.randint(2, 5)
    return {"a": price, "r": count * price} if count <= 9 else None


def _add_product(rng: random.Random, count: int) -> Numbers:
    drawn = _product(rng, count)
    return {"k": drawn["k"], "a": drawn["a"], "m": drawn["r"], "r": count + drawn["r"]}


def _subtract_product(rng: random.Random, count: int) -> Numbers:
    drawn = _product(rng, count)
    return {"k": drawn["k"], "a": drawn["a"], "m": drawn["r"], "r": count - drawn["r"]}


def _add_larger(rng: random.Random, count: int) -> Numbers:
    more = rng.randint(2, 12)
    return {"a": more, "m": count + more, "r": count + count + more}


def _add_smaller(rng: random.Random, count: int) -> Numbers | None:
    fewer = rng.randint(2, 12)
    return {"a": fewer, "m": count - fewer, "r": count + count - fewer} if count - fewer >= 2 else None


def _subtract_from(rng: random.Random, count: int) -> Numbers:
    goal = rng.choice((20, 30, 40, 50))
    return {"a": goal, "r": goal - count}


OPERATIONS: dict[str, Callable[[random.Random, int], Numbers | None]] = {
    "start": _start,
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "add": _add,
    "subtract": _subtract,
    "double": _double,
    "halve": _halve,
    "divide": _divide,
    "multiply": _multiply,
    "add_product": _add_product,
    "subtract_product": _subtract_product,
    "add_larger": _add_larger,
    "add_smaller": _add_smaller,
    "subtract_from": _subtract_from,
}
"""Each draws an event's numbers, given the count so far; None or a result outside 2..LARGEST rejects the story."""


def write_problems(config: ProblemsConfig) -> None:
    """Write the three splits and the fresh checkpoint under `config.output`."""
    folder = Path(config.output)
    counts = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}
    for split, count in counts.items():
        lines = [json.dumps(problem(config.seed, index, split)) for index in range(count)]
        write_text(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
        print(f"{folder / split}.jsonl: {count:,} problems")
    tokenizer = train_tokenizer(_tokenizer_corpus(config.seed), config.vocab_size)
    num_parameters = fresh_checkpoint(folder / "fresh", tokenizer, config.seed)
    print(f"{folder / 'fresh'}: {num_parameters:,} random parameters, {len(tokenizer)} tokens")


def _tokenizer_corpus(seed: int) -> Iterator[str]:
    """Yield chat-like texts, always equally many: the tokenizer must not depend on how many problems are asked for."""
    for index in range(10_000):
        record = problem(seed, index, "train")
        yield f"user\n{record['prompt']}\nassistant\n{record['response']}"


if __name__ == "__main__":
    run(ProblemsConfig, write_problems)
