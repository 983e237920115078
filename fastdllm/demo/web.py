"""The chat as a page: its routes, on the application that also answers OpenAI's clients."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from fastdllm.demo.conversation import ChatSettings, Mode, Speaker
from fastdllm.demo.listening import Asked, Listener
from fastdllm.serving.app import as_protocol_error, read_content
from fastdllm.serving.bodies import ReuseK, Strict
from fastdllm.serving.errors import ProtocolError

TEMPLATE = Path(__file__).with_name("chat.html")
SLOT = "FACTS_JSON"
MOST_BYTES = 2**20  # of a question
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Turn(Strict):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Wanted(Strict):
    """Settings of the next answer; what is left out is as usual."""

    mode: Mode | None = None
    threshold: float | None = None
    reuse_k: ReuseK | None = None
    subset: str | None = None


class Question(Strict):
    """What the page asks."""

    messages: list[Turn] = Field(min_length=1)
    settings: Wanted = Wanted()
    max_new_tokens: int | None = Field(default=None, ge=1)


def chat_routes(speaker: Speaker, listener: Listener, *, name: str, system: str) -> list[BaseRoute]:
    """Return the routes: / is the page, which knows the model's `name`; POST /chat answers one question of it."""
    content = page(facts(speaker, listener, name, system))

    async def show(_: Request) -> Response:
        return HTMLResponse(content, headers=HEADERS)

    async def answer(request: Request) -> Response:
        question = await _question(request)
        try:
            asked = await run_in_threadpool(  # tokens of a long text take their time
                listener.ask,
                [turn.model_dump() for turn in question.messages],
                dataclasses.replace(speaker.usual, **question.settings.model_dump(exclude_none=True)),
                question.max_new_tokens,
            )
        except (ValueError, RuntimeError) as error:
            raise as_protocol_error(error) from None
        return AnswerResponse(asked)

    return [Route("/", show), Route("/chat", answer, methods=["POST"])]


def facts(speaker: Speaker, listener: Listener, name: str, system: str) -> dict:
    """Return what the page begins with; a mode that the model does not have stands there with the reason."""
    return {
        "name": name,
        "settings": dataclasses.asdict(speaker.usual),
        "modes": {mode: _reason(speaker, mode) for mode in get_args(Mode)},
        "max_new_tokens": listener.max_new_tokens,
        "limit": speaker.limit,
        "system": system,
    }


def _reason(speaker: Speaker, mode: Mode) -> str:
    try:
        speaker.check(ChatSettings(mode=mode))
    except ValueError as error:
        return str(error)
    return ""


def page(known: dict) -> str:
    """Return the page with the facts inside it; nothing in them can end the script element or become markup."""
    content = json.dumps(known, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":  # in JSON these stand in strings alone
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(SLOT)
    return before + content + after


async def _question(request: Request) -> Question:
    """Return the question in the body; ProtocolError says what is wrong with it."""
    content = await read_content(request, MOST_BYTES)
    try:
        return Question.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ProtocolError(400, f"{where or 'the question'}: {first['msg']}.", param=where or None) from None


class AnswerResponse(StreamingResponse):
    """Streams an answer; a reader who leaves, at whatever moment, frees its slot."""

    def __init__(self, asked: Asked):
        super().__init__(_lines(asked), media_type="application/x-ndjson", headers=HEADERS)
        self.asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.asked:
            await super().__call__(scope, receive, send)


async def _lines(asked: Asked) -> AsyncIterator[str]:
    """Yield each moment of the answer, then what it took, or an error, as a line of JSON."""
    try:
        async for moment in asked:
            yield json.dumps(moment._asdict()) + "\n"
        yield json.dumps({"end": asked.end, "cost": asked.cost._asdict()}) + "\n"
    except (RuntimeError, ValueError) as error:
        yield json.dumps({"error": str(error)}) + "\n"
