"""python -m fastdllm.demo view RUN_OR_TRACE [MORE]: one HTML file that plays traces, from disk, without a network."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from fastdllm.cli import run
from fastdllm.decoding.trace import Trace, read_trace
from fastdllm.runtime import write_text

TEMPLATE = Path(__file__).with_name("trace.html")
SLOT = "TRACES_JSON"


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Write a page that plays traces: view RUN_OR_TRACE [MORE] [--output FILE]."""

    sources: list[str] = field(default_factory=list)
    """Run folders, of which all traces are taken, and trace files; the same as the words before any option."""
    output: str = ""
    """HTML file to write; empty: traces.html in the run folder of the first source."""

    def __post_init__(self):
        if not self.sources:
            raise ValueError(
                "view needs a run folder or a trace file, such as: python -m fastdllm.demo view runs/demo."
            )


def main(arguments: list[str]) -> None:
    """Run the command line; words before the first option are the sources."""
    count = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    words = [f"--sources={json.dumps(arguments[:count])}"] if count else []
    run(ViewConfig, lambda config: print(f"wrote {view(config)}"), [*words, *arguments[count:]])


def view(config: ViewConfig) -> Path:
    """Write the page and return its path.

    Raises:
        ValueError, FileNotFoundError: a source that holds no trace, or something else.
    """
    files = [file for source in config.sources for file in trace_files(Path(source))]
    folder = files[0].parent
    output = Path(config.output) if config.output else (folder.parent if folder.name == "traces" else folder)
    output = output if config.output else output / "traces.html"
    write_text(output, page([read_trace(file) for file in dict.fromkeys(files)]))
    return output


def trace_files(source: Path) -> list[Path]:
    """Return the trace files that a source names: those of a run folder by name, or the file itself."""
    if not source.is_dir():
        return [source]  # read_trace says what is wrong with it
    found = sorted((source if source.name == "traces" else source / "traces").glob("*.json"))
    if not found:
        raise FileNotFoundError(
            f"{source} holds no traces/*.json; make some with python evaluate.py --trace 2 --run {source}/, or name "
            "another run folder."
        )
    return found


def page(traces: list[Trace]) -> str:
    """Return the page, with the traces inside it; nothing in them can end the script element or become markup."""
    content = json.dumps([dataclasses.asdict(trace) for trace in traces], ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":  # in JSON these stand in strings alone
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(SLOT)
    return before + content + after
