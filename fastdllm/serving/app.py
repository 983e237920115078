"""The HTTP application: the protocol's endpoints over a service, its limits, and who may ask."""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fastdllm.decoding.rows import Request
from fastdllm.decoding.text import chat_prompt
from fastdllm.serving.answers import Answer
from fastdllm.serving.bodies import MAX_CHOICES, Body, ChatBody, TextBody, parse_body
from fastdllm.serving.errors import ProtocolError
from fastdllm.serving.replies import Reply
from fastdllm.serving.service import QueueFullError, Service, TooLongError


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What the application is called, and its limits."""

    name: str
    """Of the model, as clients give it."""
    api_key: str = ""
    """That clients must give; empty: none."""
    hosts: tuple[str, ...] = ()
    """Host names by which it may be called; none: any. Keeps web pages that point a name of theirs at this machine
    from asking it."""
    max_body_bytes: int = 2**20
    default_new_tokens: int = 512
    """Limit on new tokens of requests that give none."""
    open_paths: tuple[str, ...] = ("/health",)
    """Paths that need no API key."""


def make_app(service: Service, settings: AppSettings, extra_routes: Iterable[BaseRoute] = ()) -> Starlette:
    """Return the application; `extra_routes` come after its own, under the same limits and the same API key."""
    endpoints = _Endpoints(service, settings)
    routes = [
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.complete, methods=["POST"]),
        *extra_routes,
    ]
    handlers = {ProtocolError: _refuse, HTTPException: _refuse_http, Exception: _refuse_unexpected}
    return Starlette(routes=routes, middleware=[Middleware(Guard, settings)], exception_handlers=handlers)


class Guard:
    """Refuses requests by a wrong host name or without the API key, before anything of them is read."""

    def __init__(self, app: ASGIApp, settings: AppSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] in ("http", "websocket") else None
        if error is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await error.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})

    def _error(self, scope: Scope) -> ProtocolError | None:
        headers, settings = Headers(scope=scope), self.settings
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if settings.hosts and host not in settings.hosts:
            return ProtocolError(421, f"this server answers to {', '.join(settings.hosts)}, not to {host!r}.")
        if not settings.api_key or scope["path"] in settings.open_paths:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), settings.api_key.encode()):
            return None
        return ProtocolError(
            401, "a valid API key is required, as in 'Authorization: Bearer KEY'.", code="invalid_api_key"
        )


class _Endpoints:
    def __init__(self, service: Service, settings: AppSettings):
        self.service, self.settings = service, settings
        self._created = int(time.time())

    async def health(self, request: HttpRequest) -> Response:
        """Say whether it can answer, and how busy it is."""
        is_alive = self.service.is_alive
        state = {"status": "ok" if is_alive else "closed", **self.service.counts()}
        return JSONResponse(state, 200 if is_alive else 503)

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: HttpRequest) -> Response | None:
        body = await self._body(request, ChatBody)
        self._check_choices(1, body)
        prompt = await run_in_threadpool(self._chat_prompt, body)
        return await self._answer(request, body, [prompt])

    async def complete(self, request: HttpRequest) -> Response | None:
        body = await self._body(request, TextBody)
        self._check_choices(len(body.prompt), body)
        prompts = await run_in_threadpool(self._text_prompts, body)
        return await self._answer(request, body, prompts)

    def _model(self) -> dict[str, Any]:
        limit = self.service.max_tokens
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastdllm",
            "max_model_len": limit,
        }

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            raise ProtocolError(
                404,
                f"model {name!r} is not served here, {self.settings.name!r} is.",
                param="model",
                code="model_not_found",
            )

    async def _body(self, request: HttpRequest, kind: type[Body]) -> Any:
        body = parse_body(kind, await read_content(request, self.settings.max_body_bytes))
        self._check_name(body.model)
        return body

    def _check_choices(self, num_prompts: int, body: Body) -> None:
        num_choices, most = body.n or 1, min(MAX_CHOICES, self.service.max_waiting)  # more would never get a place
        if num_prompts * num_choices > most:
            raise ProtocolError(
                400, f"prompts times n must be at most {most}, got {num_prompts} times {num_choices}.", param="n"
            )

    def _chat_prompt(self, body: ChatBody) -> list[int]:
        try:
            with self.service.tokenizing:
                return chat_prompt(self.service.tokenizer, body.history)
        except TemplateError as error:
            raise ProtocolError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None

    def _text_prompts(self, body: TextBody) -> list[list[int]]:
        with self.service.tokenizing:
            return [
                self.service.tokenizer(prompt, add_special_tokens=False).input_ids
                if isinstance(prompt, str)
                else prompt
                for prompt in body.prompt
            ]

    async def _answer(self, request: HttpRequest, body: Body, prompts: list[list[int]]) -> Response | None:
        """Submit what the body asks for, and answer whole or in a stream; whoever hangs up frees the slots."""
        answers = self._submit(body, prompts)
        reply = Reply(
            service=self.service,
            answers=answers,
            num_choices=body.n or 1,
            model=self.settings.name,
            is_chat=isinstance(body, ChatBody),
            includes_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        if body.stream:
            return EventStream(reply)
        async with cancelled_by_disconnect(request.receive, reply):
            return JSONResponse(await reply.whole())

    def _submit(self, body: Body, prompts: list[list[int]]) -> list[Answer]:
        """Return an answer for each choice of each prompt; all are under way, or none is."""
        if body.stream_options is not None and not body.stream:
            raise ProtocolError(400, "stream_options needs stream true; leave it out.", param="stream_options")
        service, answers = self.service, []
        mode, decode, reuse = body.settings(service.mode, service.decode)
        try:
            for prompt in prompts:
                seed = _first_seed(body, decode.temperature)
                asked = Request(prompt=prompt, max_new_tokens=self._limit(body, prompt), stop_strings=body.stop)
                for number in range(body.n or 1):
                    request = replace(asked, seed=seed + number)
                    answers.append(service.submit(request, mode=mode, decode=decode, reuse=reuse))
        except (ValueError, RuntimeError) as error:
            for answer in answers:
                answer.cancel()
            raise as_protocol_error(error) from None
        return answers

    def _limit(self, body: Body, prompt: list[int]) -> int:
        left = max(1, self.service.max_tokens - len(prompt))
        return body.new_tokens or min(self.settings.default_new_tokens, left)


def _first_seed(body: Body, temperature: float) -> int:
    """Return the seed of a prompt's first choice: the one asked for, else another one each time."""
    if body.seed is not None:
        return body.seed
    return secrets.randbelow(2**31) if temperature else 0


class EventStream(Response):
    """A reply as server-sent events; at its end, or when the client hangs up, its answers are cancelled."""

    def __init__(self, reply: Reply):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_by_disconnect(receive, self.reply):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.reply.events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def cancelled_by_disconnect(receive: Receive, reply: Reply):
    """Cancel the reply's answers when the client hangs up, and when the context ends however it does."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        reply.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        reply.cancel()


async def read_content(request: HttpRequest, max_bytes: int) -> bytes:
    """Return the request's content.

    Raises:
        ProtocolError: it is not said to be JSON, or longer than it may be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what browsers send without asking first is not this
        raise ProtocolError(415, f"the content type must be application/json, got {kind!r}.")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise ProtocolError(413, f"a body may have {max_bytes:,} bytes, and this one has more.")
    return bytes(content)


def as_protocol_error(error: ValueError | RuntimeError) -> ProtocolError:
    """Return what a client is told of a request that the service did not take."""
    if isinstance(error, QueueFullError):
        return ProtocolError(429, str(error), code="queue_full")
    if isinstance(error, TooLongError):
        return ProtocolError(400, str(error), param="max_tokens", code="context_length_exceeded")
    return ProtocolError(400 if isinstance(error, ValueError) else 503, str(error))


async def _refuse(request: HttpRequest, error: ProtocolError) -> Response:
    return error.response()


async def _refuse_http(request: HttpRequest, error: HTTPException) -> Response:
    ways = {404: f"there is no {request.url.path} here.", 405: f"{request.method} does nothing at {request.url.path}."}
    response = ProtocolError(error.status_code, ways.get(error.status_code, error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _refuse_unexpected(request: HttpRequest, error: Exception) -> Response:
    return ProtocolError(500, f"the server failed: {type(error).__name__}.").response()
