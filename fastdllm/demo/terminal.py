"""The chat in a terminal: masked places fill in while one looks on; commands change how answers are decoded."""

import dataclasses
import difflib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastdllm.demo.conversation import MASKED, ChatSettings, Cost, Message, Moment, Speaker
from fastdllm.demo.listening import Listener
from fastdllm.runtime import write_text

COMMANDS = {
    "threshold": ("0.8", "confidence in (0, 1] above which a token is accepted; 1 is one token a step"),
    "reuse": ("2 middle", "refresh layers every 2nd step: first, middle, last or a list; /reuse 1 is off"),
    "ar": ("", "token by token"),
    "diffusion": ("", "by blocks, many tokens at a time"),
    "verified": ("", "drafts of an adapter, each checked token by token"),
    "new": ("", "begin a new conversation"),
    "system": ("TEXT", "what the model is told first; without TEXT nothing"),
    "save": ("FILE", "the conversation as a line of JSON with messages, as training reads it"),
    "help": ("", "this list"),
    "quit": ("", "leave; so does Ctrl-D. Ctrl-C stops an answer"),
}
FRAMES = 12  # a second
FINAL_END = "▏"  # what stands left of it is final
DRAFT = "italic underline cyan"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TerminalChat:
    """Owns one conversation, its settings and what is on the screen; promises that no mistake of the user ends it."""

    def __init__(
        self,
        speaker: Speaker,
        listener: Listener,
        settings: ChatSettings,
        *,
        console: Console,
        read: Callable[[str], str],
        system: str = "",
        frames: int = FRAMES,
    ):
        """Begin a conversation.

        Args:
            read: given a prompt, returns the next line; EOFError: there are no more.
            frames: pictures a second on a terminal; 0: one for each pass.
        """
        self.speaker, self.listener, self.settings, self.system = speaker, listener, settings, system
        self.console, self.read, self.frames = console, read, frames
        self.messages: list[Message] = []

    def run(self) -> None:
        """Talk until the user leaves."""
        while True:
            try:
                line = self.read("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("Ctrl-C stops an answer; /quit or Ctrl-D leaves")
                continue
            if line.strip() == "/quit":
                return
            try:
                self._act(line)
            except (ValueError, OSError, RuntimeError) as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:  # before an answer began, or in a command
                self._say("stopped")

    def _act(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line[1:].strip().partition(" ")
            self._command(name, rest.strip())
        elif line.strip():
            self._answer(line.strip())

    def _say(self, text: str) -> None:
        self.console.print(Text(visible(text), style="dim"), soft_wrap=True)

    def _command(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{nearest[0]}?" if nearest else "/help lists them."
            raise ValueError(f"no command /{name}; {hint} A line that begins with a space is sent as it is.")
        if rest and not COMMANDS[name][0]:
            raise ValueError(f"/{name} takes nothing behind it, got {rest!r}.")
        getattr(self, f"_{name}")(rest)

    def _change(self, **changes) -> None:
        settings = dataclasses.replace(self.settings, **changes)
        self.speaker.check(settings)
        self.settings = settings
        self._say(describe(settings))

    def _threshold(self, rest: str) -> None:
        if self.settings.mode != "diffusion":
            raise ValueError(f"a threshold has no effect in mode {self.settings.mode}; /diffusion first.")
        self._change(threshold=_number(float, "/threshold", rest, "0.8"))

    def _reuse(self, rest: str) -> None:
        if self.settings.mode != "diffusion":
            raise ValueError(f"reuse has no effect in mode {self.settings.mode}; /diffusion first.")
        words = shlex.split(rest)
        if not 1 <= len(words) <= 2:
            raise ValueError(f"/reuse takes a number and a subset, got {rest!r}; such as /reuse 2 middle.")
        reuse_k = _number(int, "/reuse", words[0], "2 middle")
        if reuse_k == 1 and len(words) == 2:
            raise ValueError(f"/reuse 1 reuses no layers, so {words[1]!r} does nothing; leave it out.")
        self._change(reuse_k=reuse_k, subset=words[1] if len(words) == 2 else self.settings.subset)

    def _ar(self, _: str) -> None:
        self._change(mode="ar")

    def _diffusion(self, _: str) -> None:
        self._change(mode="diffusion")

    def _verified(self, _: str) -> None:
        self._change(mode="verified")

    def _new(self, _: str) -> None:
        self.messages = []
        self._say("a new conversation")

    def _system(self, rest: str) -> None:
        self.system = rest
        self._say(
            "the model is told this first, from the next answer on" if rest else "the model is told nothing first"
        )

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs the name of a file, such as /save talk.jsonl.")
        if not self.messages:
            raise ValueError("there is nothing to save: the conversation is empty.")
        path = Path(rest).expanduser()
        if path.exists():
            raise ValueError(f"{path} is there already; name another file.")
        write_text(path, json.dumps({"messages": self._conversation()}, ensure_ascii=False) + "\n")
        self._say(f"saved {len(self.messages)} messages to {path}")

    def _help(self, _: str) -> None:
        rows = [(f"/{name} {example}".rstrip(), what) for name, (example, what) in COMMANDS.items()]
        self._say("\n".join(f"{usage:<18} {what}" for usage, what in rows))

    def _conversation(self) -> list[Message]:
        told = [{"role": "system", "content": self.system}] if self.system else []
        return told + self.messages

    def _answer(self, text: str) -> None:
        """Ask, show the answer as it comes, and keep both; what was stopped is kept as far as it was final."""
        self.messages.append({"role": "user", "content": text})
        said, is_kept = "", False
        try:
            with self._screen() as show, self.listener.ask(self._conversation(), self.settings) as answer:
                try:
                    for moment in answer:
                        said += moment.text
                        show(moment)
                    note, is_kept = self._note(answer.cost, answer.end), True
                except KeyboardInterrupt:
                    note, is_kept = "stopped", bool(said)
        finally:
            self.messages = [*self.messages, {"role": "assistant", "content": said}] if is_kept else self.messages[:-1]
        self._say(note)

    def _note(self, cost: Cost, end: str) -> str:
        """Return what an answer took, and what ended it if that was a limit."""
        if end == "stop":
            return str(cost)
        is_full = cost.num_prompt_tokens + cost.num_tokens >= self.speaker.limit
        return f"{cost} · " + ("the conversation is full: /new" if is_full else "cut at the limit (--max_new_tokens)")

    @contextmanager
    def _screen(self) -> Iterator[Callable[[Moment], None]]:
        """Yield what shows each moment of an answer: live on a terminal, else plain lines when it has ended."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            pieces: list[str] = []
            try:
                yield lambda moment: pieces.append(moment.text)
            finally:
                if pieces:
                    text = "".join(pieces)  # through a pipe as it is, to the letter
                    print(visible(text) if self.console.is_terminal else text, file=self.console.file, flush=True)
            return
        options = dict(transient=True, auto_refresh=self.frames > 0, refresh_per_second=self.frames or 1)
        with Live(console=self.console, vertical_overflow="crop", **options) as live:
            picture = Picture(self.console, live, is_each_shown=self.frames == 0)
            try:
                yield picture.show
            finally:
                picture.end()


class Picture:
    """Owns the part of an answer that may still change on the screen; whole lines above it are printed for good."""

    def __init__(self, console: Console, live: Live, is_each_shown: bool):
        self.console, self.live, self.is_each_shown = console, live, is_each_shown
        self.pending = ""  # final text of the line in work

    def show(self, moment: Moment) -> None:
        *lines, self.pending = (self.pending + visible(moment.text)).split("\n")
        picture = paint(self.pending, moment.draft)
        rows = picture.wrap(self.console, self.console.width)
        room = max(2, self.console.height - 2)
        if len(rows) > room:  # a paragraph longer than the screen: its end, where things happen
            picture = Text("\n").join(rows[-room:])
        self._print(lines)
        self.live.update(picture, refresh=self.is_each_shown or bool(lines))

    def end(self) -> None:
        self._print([self.pending] if self.pending else [])

    def _print(self, lines: list[str]) -> None:
        """Print lines for good, above the picture, which would be painted again below them as it was."""
        if lines:
            self.live.update(Text(""), refresh=True)
            self.console.print(Text("\n".join(lines)), soft_wrap=True)


def paint(final: str, draft: list[str | None]) -> Text:
    """Return final text, then what may still change: set off by a bar, by its form and by its colour."""
    text = Text(final)
    if draft:
        text.append(FINAL_END, "bold")
    for piece in draft:
        text.append(MASKED if piece is None else visible(piece).replace("\n", "⏎"), "dim" if piece is None else DRAFT)
    return text


def visible(text: str) -> str:
    """Return the text with control characters, which could command the terminal, as pictures of them."""
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\ufffd", text)


def describe(settings: ChatSettings) -> str:
    """Return the settings as one line."""
    if settings.mode != "diffusion":
        return {"ar": "token by token", "verified": "drafts, verified token by token"}[settings.mode]
    reuse = f", layers {settings.subset} refreshed every {settings.reuse_k} steps" if settings.reuse_k > 1 else ""
    return f"by blocks, threshold {settings.threshold:g}{reuse}"


def _number(kind: Callable[[str], float], command: str, value: str, example: str) -> float:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{command} needs a number, got {value!r}; such as {command} {example}.") from None


def read_line(prompt: str) -> str:
    """Return the next line of standard input, asked for with the prompt on a terminal; EOFError: there are no more."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # lines that can be edited and called back, where Python has it
            import readline  # noqa: F401
        return input(prompt)
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(errors="replace").rstrip("\r\n")
