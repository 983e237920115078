"""python -m fastdllm.demo chat --checkpoint PATH: talk to a model in the terminal, or with --web in the browser."""

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from fastdllm.cli import run
from fastdllm.decoding.text import load
from fastdllm.demo.conversation import ChatSettings, Mode, Speaker
from fastdllm.demo.listening import Listener
from fastdllm.demo.terminal import TerminalChat, describe, read_line
from fastdllm.runtime import device_name
from fastdllm.serving.command import LOOPBACK_NAMES, address, check_extra, listen, model_name, most_tokens, run_app
from fastdllm.serving.service import Service

DRAWN_ALONE = ("top_p", "seed")
WEB_ALONE = ("port", "batch_size")  # without --web there is one conversation, and no server


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a model: in the terminal, or with --web on a page of this machine."""

    checkpoint: str
    """Hub id, local HF folder (an export, a published checkpoint or a plain Qwen2.5) or .gguf file."""
    adapter: str = ""
    """Folder of a gated adapter, which drafts for mode verified; empty for none."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    mode: Literal["auto", Mode] = "auto"
    """How to begin; auto: by blocks for an adapted checkpoint, verified with an adapter, else token by token (ar)."""
    threshold: float = 0.0
    """How to begin in mode diffusion: confidence in (0, 1] above which a token is accepted; 0: the checkpoint's own."""
    max_new_tokens: int = 512
    """Limit of an answer, 1 or more tokens."""
    max_tokens: int = 0
    """Limit of a conversation, in tokens: memory for so many is taken for each answer in work. 0: 4096, or what the
    model has positions for."""
    temperature: float = 0.0
    """0 is greedy; above 0 tokens are drawn at this temperature."""
    top_p: float = 0.95
    """Probability mass in (0, 1] that is drawn from when temperature is above 0."""
    seed: int = 0
    """Seed of what is drawn when temperature is above 0; the same conversation gets the same answers."""
    system: str = ""
    """What the model is told first; empty for nothing beyond its template."""
    web: bool = False
    """Serve a page on this machine's loopback, for several users at once, in place of the terminal."""
    port: int = 8000
    """Where the page is served; 0 for any that is free."""
    batch_size: int = 8
    """Answers that the page's users get at a time; more wait."""

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 (chosen) or more, got {self.max_tokens}.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to {2**16 - 1}, got {self.port}.")
        for name in DRAWN_ALONE:
            if not self.temperature and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} does nothing at temperature 0, got {getattr(self, name)}; set temperature.")
        for name in WEB_ALONE:
            if not self.web and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} does nothing in the terminal, got {getattr(self, name)}; add --web.")


def main(arguments: list[str]) -> None:
    """Run the command line."""
    run(ChatConfig, chat, arguments)


def chat(config: ChatConfig) -> None:
    """Load the model and talk until the user leaves.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: what cannot be loaded, or settings that the model does not have;
            the extra `serve` is not installed, or the port is taken.
    """
    if not config.web:
        with _opened(config, batch_size=1) as listener:
            _talk(config, listener)
        return
    check_extra("chat --web")
    with listen(LOOPBACK_NAMES[0], config.port) as door, _opened(config, config.batch_size) as listener:
        serve_page(config, listener, door)


@contextmanager
def _opened(config: ChatConfig, batch_size: int) -> Iterator[Listener]:
    generator = load(config.checkpoint, device=config.device, adapter=config.adapter)
    model, tokenizer = generator.model, generator.tokenizer
    limit = most_tokens(model, config.max_tokens)
    decode = dataclasses.replace(generator.decode, temperature=config.temperature, top_p=config.top_p)
    speaker = Speaker(model, tokenizer, generator.mode, decode, limit)
    speaker.usual = first_settings(speaker, config)
    options = dict(mode=generator.mode, modes=generator.modes, decode=decode)
    with Service(model, tokenizer, batch_size=batch_size, max_tokens=limit, **options) as service:
        yield Listener(speaker, service, max_new_tokens=config.max_new_tokens, seed=config.seed)


def _talk(config: ChatConfig, listener: Listener) -> None:
    console, speaker = Console(highlight=False), listener.speaker
    if console.is_terminal:
        device = device_name(speaker.model.device)
        console.print(f"{config.checkpoint} on {device}, {describe(speaker.usual)}; /help", markup=False)
    TerminalChat(speaker, listener, speaker.usual, console=console, read=read_line, system=config.system).run()


def first_settings(speaker: Speaker, config: ChatConfig) -> ChatSettings:
    """Return the settings to begin with; ValueError: the model does not have them."""
    mode = speaker.usual.mode if config.mode == "auto" else config.mode
    if config.threshold and mode != "diffusion":
        raise ValueError(f"threshold has no effect in mode {mode}, got {config.threshold}; leave it out.")
    settings = dataclasses.replace(speaker.usual, mode=mode, threshold=config.threshold or speaker.usual.threshold)
    speaker.check(settings)
    return settings


def serve_page(config: ChatConfig, listener: Listener, door: socket.socket) -> None:
    """Serve the page, and OpenAI's clients beside it, until Ctrl-C."""
    from fastdllm.demo.web import chat_routes
    from fastdllm.serving.app import AppSettings, make_app

    name = model_name(config.checkpoint)
    settings = AppSettings(name=name, hosts=LOOPBACK_NAMES, default_new_tokens=config.max_new_tokens)
    routes = chat_routes(listener.speaker, listener, name=name, system=config.system)
    app = make_app(listener.service, settings, routes)
    run_app(app, door, f"talk to {name} at {address(door)}/ ; Ctrl-C ends it")
