"""What clients get back: completions as JSON, and their chunks as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastdllm.decoding.rows import Completion
from fastdllm.serving.answers import Answer, Update
from fastdllm.serving.errors import ProtocolError
from fastdllm.serving.service import Service

END = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answers to one body, and how its protocol names what they are part of."""

    service: Service
    answers: list[Answer]
    """`num_choices` for each prompt, one prompt after the other."""
    num_choices: int
    model: str
    is_chat: bool
    includes_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()

    async def whole(self) -> dict[str, Any]:
        """Wait for all answers; return the completion as the protocol has it.

        Raises:
            ProtocolError: an answer failed.
        """
        for answer in self.answers:
            async for _ in answer:
                pass
        for answer in self.answers:
            self._check(answer)
        choices = [self._choice(index, answer) for index, answer in enumerate(self.answers)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the completion in chunks, as text becomes final; an answer that fails ends them with its error."""
        try:
            async for choice in self._chunks():
                yield self._event([choice])
            if self.includes_usage:
                yield self._event([], self._usage())
        except ProtocolError as error:
            yield _event(error.body())
        yield END

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        pieces = [self.service.pieces(answer.request) for answer in self.answers]
        if self.is_chat:
            for index in range(len(self.answers)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, update in merge(self.answers):
            if update is None:
                answer = self.answers[index]
                self._check(answer)
                if rest := pieces[index].finish():
                    yield self._chunk(index, {"content": rest})
                yield self._chunk(index, {}, self._finish_reason(answer))
            elif piece := pieces[index].feed(update.tokens):
                yield self._chunk(index, {"content": piece})

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = answer.completion.text
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": self._finish_reason(answer)}

    def _finish_reason(self, answer: Answer) -> str:
        """Return stop if a stop token or string ended the answer, length if the limit did."""
        completion, tokenizer = answer.completion, self.service.tokenizer
        if len(completion.tokens) < answer.request.max_new_tokens or completion.tokens[-1] in self.service.stop_ids:
            return "stop"
        was_cut = completion.text != tokenizer.decode(completion.tokens, skip_special_tokens=False)
        return "stop" if was_cut else "length"

    def _check(self, answer: Answer) -> None:
        if answer.completion is None:
            raise ProtocolError(500, f"the request could not be answered: {answer.error}")

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self._head("chat.completion.chunk" if self.is_chat else "text_completion"), "choices": choices}
        return _event(chunk | {"usage": usage} if self.includes_usage else chunk)

    def _usage(self) -> dict[str, Any]:
        """Return tokens, and what they took; a prompt counts once for all of its choices."""
        first = self.answers[:: self.num_choices]
        completions = [answer.completion for answer in self.answers]
        prompt_tokens = sum(len(answer.request.prompt) for answer in first)
        new_tokens = sum(completion.counted_tokens for completion in completions)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in first)},
            "fastdllm": measures(completions, [answer.seconds for answer in self.answers]),
        }


def measures(completions: list[Completion], seconds: list[float]) -> dict[str, float]:
    """Return the passes that the completions took, their tokens per forward pass, and the longest one's seconds."""
    names = ("prefill_passes", "denoise_passes", "append_passes", "layers_run", "checked_drafts", "accepted_drafts")
    counts = {name: sum(getattr(completion, name) for completion in completions) for name in names}
    passes = counts["denoise_passes"] + counts["append_passes"]
    tokens = sum(completion.counted_tokens for completion in completions)
    return {"tokens_per_forward": round(tokens / max(passes, 1), 4), **counts, "seconds": round(max(seconds), 4)}


async def merge(answers: list[Answer]) -> AsyncIterator[tuple[int, Update | None]]:
    """Yield the updates of all answers as they come, each with its answer's number; None is that answer's end."""
    arrived: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        async for update in answer:
            arrived.put_nowait((index, update))
        arrived.put_nowait((index, None))

    readers = [asyncio.create_task(read(index, answer)) for index, answer in enumerate(answers)]
    try:
        num_ended = 0
        while num_ended < len(answers):
            index, update = await arrived.get()
            num_ended += update is None
            yield index, update
    finally:
        for reader in readers:
            reader.cancel()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
