"""What each problem of a measurement got, small enough to be kept in its row: what paired comparisons are made from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdllm.decoding.rows import Completion

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One value per problem, in the order of task and problem number."""

    problems: str
    """Digest of what was asked: two rows may be paired problem by problem where it is the same."""
    correct: tuple[float, ...]
    """The main metric, in [0, 1]."""
    tokens: tuple[int, ...] | None
    """Tokens counted; None for log-likelihoods."""
    passes: tuple[int, ...] | None
    """Denoise and append passes, which tokens per forward are divided by; None for log-likelihoods."""

    @property
    def is_binary(self) -> bool:
        """Whether every problem is either right or wrong."""
        return set(self.correct) <= {0.0, 1.0}


def pack_outcomes(
    problems: Sequence[Mapping[str, Any]], completions: Mapping[tuple[str, int], Completion], *, mode: str
) -> dict[str, Any]:
    """Return the row field of these problems: a digest and strings, of one character per problem where it is 0 or 1.

    Args:
        problems: as scored, each with task, doc_id, target and correct.
        completions: what was counted, by (task, doc_id); empty for log-likelihoods.
        mode: ar has no append passes.
    """
    ordered = sorted(problems, key=lambda problem: (problem["task"], problem["doc_id"]))
    asked = [[problem["task"], problem["doc_id"], problem["target"]] for problem in ordered]
    done = [completions[problem["task"], problem["doc_id"]] for problem in ordered] if completions else None
    passes = done and [each.denoise_passes + (each.append_passes if mode != "ar" else 0) for each in done]
    return {
        "problems": hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16],
        "correct": _join_metric([float(problem["correct"]) for problem in ordered]),
        "tokens": done and " ".join(str(each.counted_tokens) for each in done),
        "passes": passes and " ".join(map(str, passes)),
    }


def read_outcomes(row: Row) -> Outcomes:
    """Return what each problem of a row got.

    Raises:
        ValueError: the row is older than outcomes in rows.
    """
    packed = row["outcomes"]
    if packed is None:
        raise ValueError(
            f"row {row['cell']} does not say what each problem got (it is older than that): measure it again, with "
            "--force, to compare it problem by problem."
        )
    text = packed["correct"]
    correct = tuple(map(float, text.split() if " " in text or "." in text else text))
    tokens, passes = (packed[name] and tuple(map(int, packed[name].split())) for name in ("tokens", "passes"))
    return Outcomes(problems=packed["problems"], correct=correct, tokens=tokens, passes=passes)


def _join_metric(values: Sequence[float]) -> str:
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return " ".join(map(repr, values))
