"""What clients send: bodies of the protocol, checked field by field, and the requests that they ask for.

A field that would change the answer and that nothing here can honour is refused, unless it has the value that asks for
nothing (frequency_penalty 0); one that could not change any answer (user, metadata) is taken and not looked at.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.policies import DEFAULT_THRESHOLD
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.serving.errors import ProtocolError

MAX_CHOICES = 64
MAX_STOP = 1000  # characters: as many tokens may have to be searched again after every pass
LEAST_TEMPERATURE = 0.01  # below, logits divided by it may leave float32's range
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
NOTHING_ASKED: dict[
    str, tuple[Any, ...]
] = {  # field that is not honoured -> the values, beside null, that ask for nothing
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
EMPTY_IN_MESSAGES = ("refusal", "annotations", "audio", "function_call", "tool_calls")  # as clients send answers back


def _text(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content must be a string or a list of text parts, got {_short(content)}.")
    for part in content:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not is_text or not isinstance(part["text"], str):
            raise ValueError(f'a part of content must be {{"type": "text", "text": "..."}}, got {_short(part)}.')
    return "".join(part["text"] for part in content)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop must be a string or up to 4 of them, none empty, got {_short(stop)}.")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP:
        raise ValueError(f"a string of stop must have at most {MAX_STOP:,} characters, got one of {longest:,}.")
    return tuple(stops)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """Return the prompts: one, or a list of them, each a string or token ids."""

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) or is_ids(one) for one in prompts):
        raise ValueError(f"prompt must be a string, token ids, or a list of either, none empty, got {_short(prompt)}.")
    if "" in prompts:
        raise ValueError("prompt must hold at least one token, got an empty string.")
    return prompts


def _temperature(value: float | None) -> float | None:
    if value and value < LEAST_TEMPERATURE:
        raise ValueError(f"temperature must be 0 (greedy) or {LEAST_TEMPERATURE} to 2, got {value}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


ReuseK = Annotated[int, Field(le=2**31)]  # steps are counted in 64 bits, and no answer has so many


class Strict(BaseModel):
    """Values of the wrong type are refused, not converted; so is what is not a field."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_text)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Changes no text: without obfuscation is how it is."""


class Body(Strict):
    """What both kinds of completion may ask for; None stands for what the server was started with."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # this server's own
    mode: Literal["diffusion", "ar"] | None = None
    threshold: float | None = None
    policy: str | None = None
    policy_parameter: float | None = None
    reuse_k: ReuseK | None = None
    subset: str | None = None
    reuse_mode: str | None = None

    @property
    def new_tokens(self) -> int | None:
        """The limit on new tokens that is asked for."""
        return self.max_tokens

    def settings(self, mode: str, decode: DecodeConfig) -> tuple[str, DecodeConfig, ReuseConfig]:
        """Return mode, decoding and reuse, from what the server was started with.

        Raises:
            ProtocolError: options that are out of range or do not go together.
        """
        mode = self.mode or mode
        chosen = self.model_dump(exclude_none=True)
        for name in ("threshold", "policy", "policy_parameter", "reuse_k", "subset", "reuse_mode"):
            if mode == "ar" and name in chosen:
                raise ProtocolError(400, f"{name} has no effect token by token (mode ar); leave it out.", param=name)
        for name in ("subset", "reuse_mode"):
            if name in chosen and chosen.get("reuse_k", 1) == 1:
                raise ProtocolError(400, f"{name} does nothing without reuse_k 2 or more; leave it out.", param=name)
        decode = decode.token_by_token if mode == "ar" else decode
        changes = _of(DecodeConfig, chosen)
        if changes.get("policy", decode.policy) != decode.policy:  # whose numbers are not the other one's
            changes = {"threshold": DEFAULT_THRESHOLD, "policy_parameter": 0.0} | changes
        try:
            return mode, dataclasses.replace(decode, **changes), ReuseConfig(**_of(ReuseConfig, chosen))
        except ValueError as error:
            raise ProtocolError(400, str(error)) from None


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def new_tokens(self) -> int | None:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ProtocolError(
                400,
                "max_tokens and max_completion_tokens mean the same, and differ here; leave one out.",
                param="max_completion_tokens",
            )
        return next(iter(given), None)

    @property
    def history(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(one.role, one.role), "content": one.content} for one in self.messages]


class TextBody(Body):
    prompt: Annotated[list[Any], PlainValidator(_prompts)]


def _of(config: type, chosen: dict[str, Any]) -> dict[str, Any]:
    return {field.name: chosen[field.name] for field in dataclasses.fields(config) if field.name in chosen}


def parse_body(kind: type[Body], content: bytes) -> Body:
    """Return the body that the bytes are.

    Raises:
        ProtocolError: no JSON object, or a field with a name, type or value that is not taken.
    """
    try:
        fields = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(400, f"the body must be JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ProtocolError(400, f"the body must be a JSON object, got {_short(fields)}.", code="invalid_json")
    for name, neutral in NOTHING_ASKED.items():
        _refuse_if_asked(name, fields, neutral)
    kept = {name: value for name, value in fields.items() if name not in HARMLESS and name not in NOTHING_ASKED}
    for number, message in enumerate(_messages(kept)):
        for name in EMPTY_IN_MESSAGES:
            _refuse_if_asked(name, message, ([],), f"messages.{number}.")
            message.pop(name, None)
    try:
        return kind.model_validate({name: value for name, value in kept.items() if value is not None})
    except ValidationError as error:
        raise _protocol_error(error) from None


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def _refuse_if_asked(name: str, fields: dict[str, Any], neutral: tuple[Any, ...], where: str = "") -> None:
    value = fields.get(name)
    if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
        raise ProtocolError(
            400,
            f"{where}{name} is not supported, and {_short(value)} would change the answer; leave it out.",
            param=f"{where}{name}",
            code="unsupported_parameter",
        )


def _protocol_error(error: ValidationError) -> ProtocolError:
    """Return the first thing that is wrong, as the protocol says it."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ProtocolError(
            400, f"{param} is not a field that this server knows; leave it out.", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        return ProtocolError(400, f"{param} is required.", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    message = message if first["type"] == "value_error" else f"{param}: {message}, got {_short(first['input'])}."
    return ProtocolError(400, message, param=param, code="invalid_value")
