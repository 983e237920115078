"""Requests out of files of evaluation data, with the words in which an evaluation asks them."""

import gzip
import json

from fastdllm.decoding.rows import Request

FORMS = {  # field of a line -> what the user asks, and how the answer begins
    "question": (
        "Question: {question}\nPlease reason step by step, and put your final answer within \\boxed{{{{}}}}.",
        "",
    ),
    "entry_point": (
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n",
        "Here is the completed function:\n```python\n{prompt}\n",
    ),
    "prompt": ("{prompt}", ""),
}


def _read_lines(path: str) -> list[dict]:
    """Return the objects of a file of JSON lines, gzip or not."""
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_requests(path: str, count: int, max_new_tokens: int, tokenizer) -> list[Request]:
    """Return the requests of the file's first lines. Raises ValueError for lines of no known form."""
    lines, texts = _read_lines(path)[:count], []
    for line in lines:
        name = next((name for name in FORMS if name in line), None)
        if name is None:
            raise ValueError(f"{path} has a line without any of {', '.join(FORMS)}: {sorted(line)}.")
        question, beginning = (form.format(**line) for form in FORMS[name])
        turns = [{"role": "user", "content": question}]
        turns += [{"role": "assistant", "content": beginning}] if beginning else []
        options = {"continue_final_message": True} if beginning else {"add_generation_prompt": True}
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    prompts = tokenizer(texts, add_special_tokens=False).input_ids
    return [Request(prompt=prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
