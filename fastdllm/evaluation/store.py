"""Finished samples of one measurement, on disk as soon as they finish: a killed evaluation goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any

Key = tuple[str, int, int, str]
"""Task name, problem number, number of the request within the problem, digest of what the model read."""


def digest(*read: Any) -> str:
    """Return 16 hex digits over JSON: what a model reads for one request (tokens, limits, stop strings), or a row."""
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


class SampleStore:
    """Owns `<cell>.partial.jsonl`: a line that says what its samples belong to, then a line per finished sample.

    A line is written before `add` returns, so a killed process loses nothing that was added; a machine that loses power
    may. Lines are only ever appended, by one process at a time; one that is not whole is ignored when the file is read,
    and of two lines for one sample the first counts.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]):
        """Read the samples that `path` holds, or begin the file.

        Args:
            identity: what all samples of a file have in common, such as settings and weights, as JSON. A file of
                another identity is set aside under a free name, with a message.
        """
        self.path = Path(path)
        self.samples: dict[Key, Any] = {}
        """What was added, by key."""
        self.seconds, self.decode_seconds = 0.0, 0.0
        """What the samples of this file took, over all processes that wrote it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        *lines, rest = self.path.read_text(errors="replace").split("\n") if self.path.exists() else [""]
        found = _parse(lines[0]) if lines else identity
        if found != identity:
            self._set_aside(found, identity)
            lines, rest = [], ""
        for line in lines[1:]:
            self._take(_parse(line))
        self._file = self.path.open("a" if lines else "w")
        if not lines:
            self._write(identity)
        elif rest:
            self._file.write("\n")  # ends the line that a killed process left

    def add(self, key: Key, sample: Any, seconds: float, decode_seconds: float = 0.0) -> None:
        """Keep a sample (JSON) and the time since the one before it; one that is there already is not kept again."""
        if key in self.samples:
            return
        entry = {"key": key, "sample": sample, "seconds": seconds, "decode_seconds": decode_seconds}
        self._write(entry)
        self._take(entry)

    def close(self) -> None:
        """Let go of the file and leave it there."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file: its samples are kept elsewhere now."""
        self.close()
        self.path.unlink()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _take(self, entry: dict[str, Any] | None) -> None:
        if entry is None or tuple(entry["key"]) in self.samples:
            return
        self.samples[tuple(entry["key"])] = entry["sample"]
        self.seconds += entry["seconds"]
        self.decode_seconds += entry["decode_seconds"]

    def _set_aside(self, found: dict[str, Any] | None, identity: dict[str, Any]) -> None:
        taken, number = self.path, 0
        while taken.exists():
            number += 1
            taken = self.path.with_name(f"{self.path.name.removesuffix('.jsonl')}.{number}.jsonl")
        names = sorted(name for name in identity | (found or {}) if (found or {}).get(name) != identity.get(name))
        self.path.rename(taken)
        print(
            f"{self.path} holds samples of another measurement ({', '.join(names)} changed); set aside as "
            f"{taken.name}, beginning anew.",
            flush=True,
        )


def _parse(line: str) -> dict[str, Any] | None:
    """Return the object in a line, None for a line that is not whole."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
