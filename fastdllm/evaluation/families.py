"""Which tasks are known by name: what a row's accuracy is, in which form they are asked, whether they run code.

docs/tasks.md is this table for readers; a test holds the two together.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is the same for the tasks whose names begin alike; of several that fit, the longest name counts."""

    metric: str
    """lm-eval's metric that a row's accuracy holds."""
    filter_name: str
    """Which of the task's answers it is taken from."""
    folders: tuple[str, ...] = ()
    """Where lm-eval keeps the tasks; (): they are the project's own."""
    is_completion: bool = False
    """Asked as text to be continued, without chat template: in a chat the model answers with a whole program in a code
    fence, which behind the prompt is no program."""
    runs_code: bool = False
    """It runs what the model wrote."""
    stock: str = ""
    """lm-eval's task that it is; "": the one of its own name."""
    data: str = ""
    """Hub id of the data, where it is not the stock task's."""


NUMBER = {"metric": "exact_match", "filter_name": "flexible-extract"}
LETTER = {"metric": "acc", "filter_name": "none"}
HUMANEVAL = {"metric": "pass@1", "filter_name": "create_test", "folders": ("humaneval",), "runs_code": True}
MBPP = {"metric": "pass_at_1", "folders": ("mbpp",), "runs_code": True}
GPQA_IN_WORDS = [f"gpqa_{part}_{form}" for part in ("main", "diamond", "extended") for form in ("generative", "cot")]
FAMILIES = {
    "tiny_problems": Family(**NUMBER),
    "gsm8k": Family(**NUMBER, folders=("gsm8k",)),
    "minerva_math": Family(metric="math_verify", filter_name="none", folders=("minerva_math", "benchmarks")),
    "ifeval": Family(metric="prompt_level_strict_acc", filter_name="none", folders=("ifeval",)),
    "mmlu": Family(**LETTER, folders=("mmlu",)),
    "mmlu_generative": Family(metric="exact_match", filter_name="get_response", folders=("mmlu",)),
    "gpqa": Family(**LETTER, folders=("gpqa",)),
    **{name: Family(**NUMBER, folders=("gpqa",)) for name in GPQA_IN_WORDS},
    "humaneval": Family(**HUMANEVAL, is_completion=True),
    "humaneval_plus": Family(**HUMANEVAL, is_completion=True),
    "humaneval_instruct": Family(**HUMANEVAL),
    "humaneval_plus_instruct": Family(**HUMANEVAL, stock="humaneval_instruct", data="evalplus/humanevalplus"),
    "mbpp": Family(**MBPP, filter_name="none", is_completion=True),
    "mbpp_plus": Family(**MBPP, filter_name="none", is_completion=True),
    "mbpp_instruct": Family(**MBPP, filter_name="extract_code"),
    "mbpp_plus_instruct": Family(**MBPP, filter_name="extract_code"),
}
CODE_TASKS = tuple(name for name, family in FAMILIES.items() if family.runs_code)


def family_of(task: str) -> Family | None:
    """Return the family of a task, None for one that is not known by name. Code tasks are known by their whole name."""
    names = [name for name in FAMILIES if task == name or (task.startswith(name) and name not in CODE_TASKS)]
    return FAMILIES[max(names, key=len)] if names else None
