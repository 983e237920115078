"""What happened at each step of one sequence: a plain decoder's candidates, and the engine's trace as a JSON file.

The fields of the file are explained in docs/reference/traces.md.
"""

import dataclasses
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from fastdllm.runtime import write_text

FORMAT, VERSION = "fastdllm-trace", 1
KINDS = ("prefill", "full", "sub_block", "reuse", "append", "token", "verify")
TIMINGS = ("undisturbed", "while_recording")


class Candidate(NamedTuple):
    """A masked place of the active sub-block at one denoising step."""

    place: int
    """From the beginning of the sequence, prompt included."""
    token: int
    """The proposal."""
    confidence: float
    """Its probability."""
    is_accepted: bool
    """Whether it was written in this step."""


Step = list[Candidate]


def note_step(offset: int, token: Tensor, confidence: Tensor, is_candidate: Tensor, is_accepted: Tensor) -> Step:
    """Return the candidates of a step over the places from `offset` on, from tensors [1, S]."""
    rows = zip(*(x[0].tolist() for x in (token, confidence, is_candidate, is_accepted)), strict=True)
    return [
        Candidate(offset + number, token, confidence, is_accepted)
        for number, (token, confidence, is_candidate, is_accepted) in enumerate(rows)
        if is_candidate
    ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A token that could stand at a place, and its probability there."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """A token that a pass wrote."""

    place: int
    """From the beginning of the sequence, prompt included."""
    token: int
    text: str
    """The token decoded alone; a part of a character is U+FFFD."""
    confidence: float
    """The model's probability of the token, at temperature 1."""
    alternatives: list[Choice]
    """The most likely other tokens, the best first."""


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One pass of the engine, or the two that make up a denoising step of schedule adaptive."""

    kind: str
    """One of KINDS."""
    seconds: float
    """Its end, from the beginning of the run."""
    rows: int
    """Rows computed in each layer that ran; 0 where none did."""
    reused: list[int]
    """Layers that did not run; in reuse mode attn, those whose attention did not."""
    tokens: list[Unmasked]
    """What it wrote, by place."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """How one request was decoded, alone; checked when it is made, so a file that reads is one that can be shown."""

    format: str = FORMAT
    version: int = VERSION
    cell: str = ""
    """Name of the measurement that it belongs to."""
    label: str
    """Name of the model."""
    task: str = ""
    problem: int = 0
    """Number of the problem in the task."""
    target: str = ""
    correct: float | None = None
    """What the answer scored; None: not scored."""
    mode: str
    """diffusion or ar."""
    settings: dict = field(default_factory=dict)
    """What decided the decoding, as in a row's config."""
    identity: dict = field(default_factory=dict)
    """checkpoint_hash, config_digest, revision."""
    device: str
    dtype: str
    timing: str
    """undisturbed: the seconds are those of a second run that recorded nothing; while_recording: that run went another
    way, and the seconds hold what recording took."""
    num_layers: int
    block_size: int
    """Tokens; 1 where there are no blocks."""
    num_prompt_tokens: int
    prompt: str
    text: str
    """The answer, without its stop token."""
    num_tokens: int
    """Tokens of the answer, stop token included; what was written behind them is not part of it."""
    steps: list[TraceStep]

    def __post_init__(self):
        _require(self.mode in ("diffusion", "ar"), "mode must be diffusion or ar", self.mode)
        _require(self.timing in TIMINGS, f"timing must be one of {', '.join(TIMINGS)}", self.timing)
        for name in ("num_layers", "block_size", "num_prompt_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more", getattr(self, name))
        places, before = set(), 0.0
        for number, step in enumerate(self.steps):
            where = f"steps[{number}]"
            _require(step.kind in KINDS, f"{where}.kind must be one of {', '.join(KINDS)}", step.kind)
            _require(step.seconds >= before, f"{where}.seconds must not be below {before}", step.seconds)
            known = set(range(self.num_layers))
            _require(known.issuperset(step.reused), f"{where}.reused must name layers of {len(known)}", step.reused)
            for token in step.tokens:
                is_new = token.place >= self.num_prompt_tokens and token.place not in places
                _require(is_new, f"{where} must write each place behind the prompt once", token.place)
                _require(0 <= token.confidence <= 1.001, f"{where}: confidence must be in [0, 1]", token.confidence)
                places.add(token.place)
            before = step.seconds


def _require(is_met: bool, constraint: str, value: Any) -> None:
    if not is_met:
        raise ValueError(f"{constraint}, got {value!r}.")


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write the trace as JSON, aside and renamed into place."""
    write_text(path, json.dumps(dataclasses.asdict(trace), ensure_ascii=False, allow_nan=False) + "\n")


def read_trace(path: str | Path) -> Trace:
    """Return the trace in a file.

    Raises:
        FileNotFoundError: there is none; ValueError: it is not one, or of another version, and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make traces with python evaluate.py --trace 2.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); a trace comes from python evaluate.py --trace 2.") from None
    kind = content.get("format") if isinstance(content, dict) else None
    if kind != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {kind!r}; a trace comes from evaluate.py --trace 2.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} must have version {VERSION}, got {content.get('version')!r}; trace again with this code."
        )
    try:
        return _parse(Trace, content, "trace")
    except ValueError as error:
        raise ValueError(f"{path}: {error} Trace again, with --force.") from None


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return `value`, which JSON gave, as a `kind`: a dataclass, list, union or plain type. Raises ValueError."""
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{where} must be an object", value)
        hints, names = get_type_hints(kind), {one.name for one in fields(kind)}
        wrong = sorted(names ^ value.keys())
        _require(not wrong, f"{where} must have exactly the keys {', '.join(sorted(names))}; wrong are", wrong)
        return kind(**{name: _parse(hints[name], inner, f"{where}.{name}") for name, inner in value.items()})
    if get_origin(kind) is list:
        _require(isinstance(value, list), f"{where} must be a list", value)
        return [_parse(get_args(kind)[0], inner, f"{where}[{number}]") for number, inner in enumerate(value)]
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = (*kinds, int) if float in kinds else kinds
    is_one = isinstance(value, kinds) and not isinstance(value, bool)
    _require(is_one, f"{where} must be {' or '.join(one.__name__ for one in kinds)}", value)
    return value
