"""The chat as a page: its routes, on the application that also answers OpenAI's clients."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fastdllm.demo.conversation import ChatSettings, Mode, Speaker
from fastdllm.demo.listening import Asked, Listener
from fastdllm.serving.service import QueueFullError

TEMPLATE = Path(__file__).with_name("chat.html")
SLOT = "FACTS_JSON"
LOOPBACK = ["127.0.0.1", "localhost"]
MOST_BYTES = 2**20  # of a question: a conversation of a model's whole context is far smaller
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


class Turn(BaseModel):
    """A message of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str


class Wanted(BaseModel):
    """Settings of the next answer; what is left out is as usual."""

    model_config = ConfigDict(extra="forbid", strict=True)
    mode: Mode | None = None
    threshold: float | None = None
    reuse_k: int | None = None
    subset: str | None = None


class Question(BaseModel):
    """What the page asks."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[Turn] = Field(min_length=1)
    settings: Wanted = Wanted()
    max_new_tokens: int | None = Field(default=None, ge=1)


def only_here(app: ASGIApp) -> ASGIApp:
    """Return the application for requests that name this machine: a name of another site that leads here is refused."""
    return TrustedHostMiddleware(app, allowed_hosts=LOOPBACK, www_redirect=False)


def chat_routes(speaker: Speaker, listener: Listener, *, name: str, system: str) -> list[BaseRoute]:
    """Return the routes: / is the page, which knows the model's `name`; POST /chat answers one question of it."""
    content = page(facts(speaker, listener, name, system))

    async def show(_: Request) -> Response:
        return HTMLResponse(content, headers=HEADERS)

    async def answer(request: Request) -> Response:
        try:
            question = await _question(request)
            asked = listener.ask(
                [turn.model_dump() for turn in question.messages],
                dataclasses.replace(speaker.usual, **question.settings.model_dump(exclude_none=True)),
                question.max_new_tokens,
            )
        except ValueError as error:
            return _refusal(400, str(error))
        except QueueFullError as error:
            return _refusal(429, str(error))
        except RuntimeError as error:  # the service has ended
            return _refusal(503, str(error))
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
    """Return the question in the body; ValueError says what is wrong with it.

    Another site's page can send a body without asking first, but not one that says it is JSON.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise ValueError("content-type must be application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ValueError(f"a question may have {MOST_BYTES:,} bytes at most; begin a new conversation.")
    try:
        return Question.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the question"
        raise ValueError(f"{where}: {first['msg']}.") from None


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


def _refusal(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers=HEADERS)
