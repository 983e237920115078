"""What a Markdown page holds that can be checked: fenced blocks, shell commands, links, places of files."""

import re
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(path for folder in ("docs", "experiments", "data") for path in (ROOT / folder).rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = r"python|make|bash|sbatch|pytest|tensorboard|benchmarks/\w+\.py|[\w./]+\.sh"
SPAN_COMMAND = re.compile(rf"(\w+=\S+ )*({PROGRAMS}) ")  # a code span that begins so is a command
TOP_FOLDERS = ("fastdllm", "docs", "tests", "benchmarks", "sbatch", "configs", "experiments", "data", ".ci")
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One shell command that a page shows, with the page's shell variables filled in."""

    page: str
    """Path of the page from the repository's root."""
    text: str
    words: list[str] = field(compare=False)
    """As the shell splits them, without settings of the environment (NAME=value) before the program."""


def page_name(path: Path) -> str:
    """Return the path from the repository's root."""
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of every fenced block."""
    return FENCE.findall(text)


def commands(path: Path) -> list[Command]:
    """Return the page's commands: the lines of its blocks without a language, and code spans that begin with a program.

    A block that is no command has a language: `text` for output, `python` for code.
    """
    text, variables, found = path.read_text(), {}, []
    lines = [line for language, block in blocks(text) if not language for line in _shell_lines(block)]
    lines += [span for span in spans(text) if SPAN_COMMAND.match(span) and " ... " not in span]
    for line in lines:
        filled = re.sub(r"\$\{?(\w+)\}?", partial(_value, variables), line)
        try:
            words = shlex.split(filled, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}: {line!r} is no shell command ({error}); give its block a language.") from None
        if not words:
            continue
        settings = [word for word in words if ASSIGNMENT.fullmatch(word)]
        if settings == words:
            variables |= {ASSIGNMENT.fullmatch(word)[1]: ASSIGNMENT.fullmatch(word)[2] for word in words}
            continue
        start = next(place for place, word in enumerate(words) if not ASSIGNMENT.fullmatch(word))
        found.append(Command(page_name(path), " ".join(words[start:]), words[start:]))
    return found


def _value(variables: dict[str, str], match: re.Match) -> str:
    return variables.get(match[1], match[0])


def _shell_lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def spans(text: str) -> list[str]:
    """Return the code spans outside fenced blocks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def links(text: str) -> list[str]:
    """Return what the page's links and pictures point to, but for other sites."""
    prose = re.sub(r"`[^`]*`", "", FENCE.sub("", text))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    return [target for target in targets if not re.match(r"\w+://", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def places(text: str) -> list[str]:
    """Return the code spans that name a file or folder of the repository, from its root."""
    shape = re.compile(rf"(?:{'|'.join(map(re.escape, TOP_FOLDERS))})/[\w./-]*|[\w-]+\.(?:md|py|toml)|Makefile")
    return [span for span in spans(text) if shape.fullmatch(span)]
