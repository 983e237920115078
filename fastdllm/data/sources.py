"""Where documents come from: a hub dataset or JSON lines -> conversations -> token ids with response labels."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import jinja2
import numpy as np
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
FORMAT_VERSION = 1  # raise it when the same source would give other tokens or labels
ROWS_CHECKED = 20  # of local files, before weights are loaded
READ_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the documents come from and how their rows are read."""

    path: str = ""
    """Dataset: a Hugging Face hub id, or local .jsonl or .jsonl.gz files separated by commas."""
    subset: str = ""
    """Configuration name of a hub dataset; empty for its only one. Hub datasets alone have it."""
    split: str = "train"
    """Split of a hub dataset; local files have none."""
    limit: int = 0
    """Rows read at most, from the start; 0 reads all."""
    messages_column: str = "messages"
    """Column with a list of {"role", "content"}; a row that has it is read by it alone."""
    prompt_column: str = "prompt"
    """Column with the question: a string, or a list of {"role", "content"}."""
    response_column: str = "response"
    """Column with the answer, a string."""
    system_column: str = ""
    """Column with the system prompt, read beside prompt_column; empty for none."""
    prompt_template: str = "{prompt}"
    """What the first user turn is turned into; {prompt} stands for its text. Use it to adapt on the form of a task."""
    strict: bool = False
    """Stop at the first malformed row instead of reporting and counting it."""

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"data.limit must be 0 (all rows) or more, got {self.limit}.")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"data.prompt_template must contain {{prompt}}, got {self.prompt_template!r}.")

    @property
    def files(self) -> list[Path]:
        """The local files, or nothing for a hub dataset."""
        names = [name.strip() for name in self.path.split(",") if name.strip()]
        is_local = any(name.endswith((".jsonl", ".json", ".gz")) or Path(name).is_file() for name in names)
        return [Path(name) for name in names] if is_local else []

    @property
    def name(self) -> str:
        """A short name for folders and reports."""
        parts = [path.name.split(".")[0] for path in self.files] or [self.path, self.subset, self.split]
        return "-".join(part for part in parts if part).replace("/", "--")[:80]


class MalformedRow(ValueError):
    """A row that cannot be read as a conversation; the message says why."""


# ---- reaching the data


def check_source(config: SourceConfig, *, needs_response: bool = True, option: str = "data.path") -> None:
    """Make sure that the data can be reached and, of local files, that one of the first rows can be read.

    A row holds a conversation with an answer, or a prompt alone where no response is needed.

    Args:
        option: what named the source, for messages.
    Raises:
        FileNotFoundError, ValueError: what is missing, and what to do.
    """
    if not config.path:
        raise ValueError("data.path must name a hub dataset or a .jsonl file, got nothing; try --data.path FILE.jsonl.")
    if config.files:
        _check_files(config, parse_row if needs_response else parse_prompt, option)
    else:
        _dataset_builder(config, option)


def _check_files(config: SourceConfig, parse: Callable[[bytes, SourceConfig], Any], option: str) -> None:
    for path in config.files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{option}: no file {path} (looked from {Path.cwd()}); give an existing .jsonl or .jsonl.gz file, "
                "or a hub dataset id."
            )
    problems = []
    for place, row in islice(_file_lines(config.files), ROWS_CHECKED):
        try:
            parse(row, config)
            break
        except MalformedRow as problem:
            problems.append(f"{place}: {problem}")
    else:
        if problems:
            raise ValueError(
                f"{option}: none of the first {len(problems)} rows of {config.path} is usable; the first: "
                f"{problems[0]}. data.messages_column, data.prompt_column, data.response_column and "
                "data.system_column name the columns, of all sources alike."
            )
    if config.subset:
        raise ValueError(f"data.subset is for hub datasets, got {config.subset!r} beside local files; leave it empty.")


def _dataset_builder(config: SourceConfig, option: str = "data.path") -> datasets.DatasetBuilder:
    """Resolve a hub dataset: its files are listed, not downloaded."""
    way_out = f"check its name and the network, or give local files: --{option} FILE.jsonl"
    try:
        builder = datasets.load_dataset_builder(config.path, config.subset or None)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{option}: the dataset {config.path!r} cannot be reached ({error}); {way_out}."
        ) from error
    except ValueError as error:
        raise ValueError(f"data.subset: {error}") from error
    splits = builder.info.splits or {}
    if splits and config.split.split("[")[0] not in splits and "+" not in config.split:
        raise ValueError(f"data.split: {config.path} has {', '.join(splits)}, got {config.split!r}.")
    return builder


# ---- reading rows


def count_and_hash(config: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """Return the number of rows (None where unknown before reading) and a hash of all that decides the tokens."""
    if config.files:
        num_rows, content = _hash_files(config.files)
    else:
        builder = _dataset_builder(config)
        split = (builder.info.splits or {}).get(config.split)
        num_rows, content = (
            split.num_examples if split else None,
            [config.path, config.subset, config.split, builder.hash],
        )
    columns = [config.messages_column, config.prompt_column, config.response_column, config.system_column]
    columns.append(config.prompt_template)
    decides = [FORMAT_VERSION, content, columns, config.limit, _tokenizer_content(tokenizer), tokenizer.chat_template]
    if num_rows is not None and config.limit:
        num_rows = min(num_rows, config.limit)
    return num_rows, hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _hash_files(paths: list[Path]) -> tuple[int, list[str]]:
    """Return the number of lines and one hash per file; a compressed file has the hash of its content."""
    num_lines, hashes = 0, []
    for path in paths:
        digest, last = hashlib.sha256(), b"\n"
        with _open(path) as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                num_lines += chunk.count(b"\n")
                last = chunk
        num_lines += not last.endswith(b"\n")
        hashes.append(digest.hexdigest())
    return num_lines, hashes


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by the last call, without meaning for us
        content.pop(state, None)
    return json.dumps(content, sort_keys=True)


def read_rows(config: SourceConfig) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yield (place, row) in order, in bounded memory; a local row is its undecoded line, so that workers parse it."""
    for number, item in enumerate(_file_lines(config.files) if config.files else _hub_rows(config)):
        if config.limit and number >= config.limit:
            return
        yield item


def _file_lines(paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():  # JSON lines may end in an empty one
                    yield f"{path}:{number}", line


def _hub_rows(config: SourceConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    streaming = config.limit > 0  # a few rows of a big dataset: do not download all of it
    rows = datasets.load_dataset(config.path, config.subset or None, split=config.split, streaming=streaming)
    for number, row in enumerate(rows, start=1):
        yield f"{config.name} row {number}", row


# ---- rows -> conversations


def parse_row(row: bytes | dict[str, Any], config: SourceConfig) -> list[dict[str, str]]:
    """Return the conversation through its last assistant turn, as [{"role", "content"}, ...].

    Raises:
        MalformedRow: with the reason.
    """
    row = _decoded(row)
    return _through_last(row, config, "assistant", (config.prompt_column, config.response_column, config.system_column))


def parse_prompt(row: bytes | dict[str, Any], config: SourceConfig) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Return the conversation through its last user turn, and the whole row; the response column is not needed.

    Raises:
        MalformedRow: with the reason.
    """
    row = _decoded(row)
    return _through_last(row, config, "user", (config.prompt_column, config.system_column)), row


def _decoded(row: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:  # also bytes that are not UTF-8
            raise MalformedRow(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise MalformedRow(f"a row must be an object, got {type(row).__name__}")
    return row


def _through_last(
    row: dict[str, Any], config: SourceConfig, role: str, columns: tuple[str, ...]
) -> list[dict[str, str]]:
    """Return the row's messages up to the last one of a role; without a column of messages, made from `columns`."""
    messages = row.get(config.messages_column)
    if messages is None:
        messages = _from_columns(row, config, columns)
    _check_messages(messages)
    ends = [number for number, message in enumerate(messages) if message["role"] == role]
    if not ends:
        raise MalformedRow(f"no {role} turn")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages[: ends[-1] + 1]]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is not None:
        first["content"] = config.prompt_template.replace("{prompt}", first["content"])
    return turns


def _from_columns(row: dict[str, Any], config: SourceConfig, columns: tuple[str, ...]) -> list[dict[str, str]]:
    for column in columns:
        if column and column not in row:
            raise MalformedRow(f"neither {config.messages_column!r} nor {column!r} is among its columns {sorted(row)}")
    prompt = row[config.prompt_column]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    system = row[config.system_column] if config.system_column else ""
    if not isinstance(turns, list):
        raise MalformedRow(
            f"{config.prompt_column!r} must be a string or a list of messages, got {type(turns).__name__}"
        )
    before = [{"role": "system", "content": system}] if system else []
    if config.response_column not in columns:
        return [*before, *turns]
    return [*before, *turns, {"role": "assistant", "content": row[config.response_column]}]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise MalformedRow("messages must be a list with at least one turn")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise MalformedRow(f"turn {number} must have a role among {', '.join(ROLES)}, got {str(message)[:80]}")
        if not isinstance(message.get("content"), str):
            raise MalformedRow(
                f"turn {number} must have a string as content, got {type(message.get('content')).__name__}"
            )
        if message["role"] == "system" and number > 0:
            raise MalformedRow(f"turn {number} is a system turn; only the first may be one")
        if message["role"] == "assistant" and number == 0:
            raise MalformedRow("the first turn is the assistant's; it needs something to answer")


# ---- conversations -> token ids


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer can turn conversations into ids."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so prompts and answers cannot be told "
            "apart; start from an instruct checkpoint, or put a chat_template.jinja beside its tokenizer files."
        )
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no tokenizer.json; convert it to a fast one.")


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Split a conversation's text into (text, is_response) segments.

    A response segment is what follows an assistant header: the content, its end-of-turn token and the newline after it.
    The template is rendered on growing parts of the conversation, so it needs no generation markers.

    Raises:
        ValueError: the template rewrites earlier turns, so the segments would not add up to the conversation.
    """
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for turns, is_response in ((messages[:number], False), (messages[: number + 1], True)):
            text = _apply_template(turns, tokenizer, add_generation_prompt=not is_response)
            if not text.startswith(done):
                raise ValueError(
                    f"the chat template of {tokenizer.name_or_path!r} writes turn {number} differently once it is "
                    "answered or followed by another turn, so response tokens cannot be found; use a template that "
                    "only appends."
                )
            segments.append((text[len(done) :], is_response))
            done = text
    return segments


def _apply_template(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise MalformedRow(f"the chat template refuses it ({error})") from error


def tokenize(
    conversations: list[list[tuple[str, bool]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the token ids of all conversations' segments, end to end, their labels, and the conversations' lengths.

    Segments are encoded one by one, as decoding does with a prompt and what is generated after it.

    Returns:
        tokens: [total] int32; is_response: [total] bool; lengths: [conversations] int64.
    """
    segments = [segment for conversation in conversations for segment in conversation]
    texts, options = [text for text, _ in segments], {"add_special_tokens": False, "return_attention_mask": False}
    ids = tokenizer(texts, **options, verbose=False)["input_ids"] if texts else []
    counts = np.array([len(part) for part in ids], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=counts.sum())
    is_response = np.array([label for _, label in segments], dtype=np.bool_).repeat(counts)
    ends = np.cumsum([0, *map(len, conversations)])
    return tokens, is_response, np.diff(np.concatenate([[0], counts.cumsum()])[ends])
