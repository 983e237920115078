"""python -m fastdllm serve --checkpoint PATH: an OpenAI-compatible server of one model."""

import contextlib
import ipaddress
import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastdllm.cli import run

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from fastdllm.model import BlockDiffusionLM

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")  # in a URL
USUAL_TOKENS = 4096  # of a request, prompt and answer


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer chat and text completions over HTTP, as OpenAI's API does."""

    checkpoint: str
    """Hub id, HF folder (an export, a published Fast-dLLM v2 checkpoint, or a plain Qwen2.5) or GGUF file."""
    adapter: str = ""
    """Folder of a gated adapter in PEFT's format, which drafts for policy verified."""
    name: str = ""
    """Of the model, as clients give it; empty: the checkpoint's last part."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    mode: str = "auto"
    """Of requests that do not say: diffusion, ar, or auto: diffusion for an adapted checkpoint."""
    threshold: float = 0.0
    """Of requests that do not say; 0: the checkpoint's own."""
    temperature: float = 0.0
    """Of requests that do not say; 0 is greedy, as models are adapted and measured, and gives the same answer each
    time. OpenAI's default is 1."""
    top_p: float = 0.95
    """Of requests that do not say; read where the temperature is above 0."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine alone."""
    port: int = 8000
    """0: any free one."""
    api_key: str = ""
    """That clients must give; whoever may list this machine's processes can read it here: see api_key_file."""
    api_key_file: str = ""
    """File whose first line is the API key."""
    is_open: bool = False
    """Serve other machines without an API key."""
    batch_size: int = 16
    """Requests that an engine decodes at a time."""
    max_waiting: int = 1024
    """Requests that may wait; more are answered with 429."""
    max_tokens: int = 0
    """Of a request, prompt and answer; 0: 4096, or what the model has positions for."""
    default_new_tokens: int = 512
    """Limit on new tokens of requests that give none."""
    max_body_bytes: int = 2**20
    """Larger bodies are answered with 413."""
    max_engines: int = 4
    """Settings (mode, policy, temperature, reuse) that are served at a time."""
    cache_bytes: int = 0
    """Memory for keys and values of all engines; 0: what the device has free."""

    def __post_init__(self):
        if self.api_key and self.api_key_file:
            raise ValueError("api_key and api_key_file mean the same; leave one out.")
        if not is_loopback(self.host) and not (self.api_key or self.api_key_file or self.is_open):
            raise ValueError(
                f"host {self.host} lets other machines ask, and no API key is set; set api_key_file, or is_open true "
                "if anyone may."
            )
        if self.is_open and (is_loopback(self.host) or self.api_key or self.api_key_file):
            raise ValueError("is_open does nothing on the loopback or with an API key; leave it out.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to 65535, got {self.port}.")
        for name in ("max_body_bytes", "default_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.max_tokens < 0 or self.cache_bytes < 0:
            raise ValueError("max_tokens and cache_bytes must be 0 (chosen) or more.")


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> tuple[str, ...]:
    """Return the names by which clients may call what listens at the address; none: any."""
    if not is_loopback(host):
        return ()
    return tuple(dict.fromkeys((*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host)))


def main(arguments: list[str]) -> None:
    """Run the command line."""
    run(ServeConfig, serve, arguments)


def serve(config: ServeConfig) -> None:
    """Answer until interrupted.

    Raises:
        RuntimeError: the extra `serve` is not installed, or the port is taken. ValueError: options that do not fit the
            checkpoint.
    """
    check_extra("serve")
    from fastdllm.serving.app import make_app

    settings, listener = app_settings(config), listen(config.host, config.port)
    with listener, make_service(config) as service:
        greeting = f"serving {settings.name} ({service.mode}) at {address(listener)}/v1; Ctrl-C ends it"
        run_app(make_app(service, settings), listener, greeting)


def check_extra(program: str) -> None:
    """Raise a RuntimeError if a library of the extra `serve`, which the program needs, is not installed."""
    for library in ("starlette", "uvicorn", "pydantic"):
        if find_spec(library) is None:
            raise RuntimeError(
                f'{program} needs {library}, which is absent; it comes with the extra: pip install -e ".[serve]".'
            )


def run_app(app: "ASGIApp", listener: socket.socket, greeting: str) -> None:
    """Answer requests to the application until Ctrl-C or SIGTERM; what is being answered then has five seconds."""
    import uvicorn

    listener.listen()  # so that whoever reads the greeting can connect
    print(greeting, flush=True)
    options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    with contextlib.suppress(KeyboardInterrupt):  # sent on when all is shut down
        uvicorn.Server(options).run(sockets=[listener])


def make_service(config: ServeConfig):
    """Return a service of the checkpoint, with what the options say of requests that do not.

    Raises:
        ValueError: more tokens than the model has positions for, or settings that do not go together.
    """
    from fastdllm.decoding.text import load
    from fastdllm.serving.service import Service

    source = load(config.checkpoint, device=config.device, mode=config.mode, adapter=config.adapter)
    decode = replace(source.decode, temperature=config.temperature, top_p=config.top_p)
    if config.threshold and source.modes == ("ar",):
        raise ValueError(
            f"threshold {config.threshold} has no effect token by token, and {config.checkpoint} was never adapted; "
            "leave it out."
        )
    if config.threshold:
        decode = replace(decode, threshold=config.threshold)
    return Service(
        source.model,
        source.tokenizer,
        mode=source.mode,
        decode=decode,
        modes=source.modes,
        batch_size=config.batch_size,
        max_waiting=config.max_waiting,
        max_tokens=most_tokens(source.model, config.max_tokens),
        max_engines=config.max_engines,
        cache_bytes=config.cache_bytes or None,
    )


def most_tokens(model: "BlockDiffusionLM", asked: int) -> int:
    """Return how many tokens prompt and answer may have: what is asked for; 0: USUAL_TOKENS, if the model has them.

    Raises:
        ValueError: more than the model has positions for.
    """
    most = model.qwen.config.max_position_embeddings
    if asked > most:
        raise ValueError(f"max_tokens must be at most {most}, the positions of this model, got {asked}.")
    return asked or min(USUAL_TOKENS, most)


def model_name(checkpoint: str) -> str:
    """Return the last part of a checkpoint's name, also where that is the folder that one stands in."""
    return Path(checkpoint).name or Path(checkpoint).resolve().name


def app_settings(config: ServeConfig):
    """Return the application's part of the options."""
    from fastdllm.serving.app import AppSettings

    key, file = config.api_key, Path(config.api_key_file)
    if config.api_key_file:
        if not file.is_file():
            raise FileNotFoundError(f"api_key_file {file}: no such file; its first line is the API key.")
        key = file.read_text().split("\n", 1)[0].strip()
        if not key:
            raise ValueError(f"{config.api_key_file} must hold the API key in its first line, which is empty.")
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError("an API key must be of printable ASCII characters without spaces, as a header can hold them.")
    return AppSettings(
        name=config.name or model_name(config.checkpoint),
        api_key=key,
        hosts=host_names(config.host),
        max_body_bytes=config.max_body_bytes,
        default_new_tokens=config.default_new_tokens,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; bound before the model is loaded, so that a taken port is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise RuntimeError(f"cannot listen at {host}, port {port}: {error}; try another --port.") from None
    return listener


def address(listener: socket.socket) -> str:
    """Return the URL of what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
