"""What is installed, against the ranges that the project names. Imports nothing heavy: what is heavy may be missing."""

import platform
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PROJECT = "fastdllm"
EXTRAS = ("eval", "serve")  # of users; the one of developers is not asked for


class Finding(NamedTuple):
    """One line of the doctor's answer."""

    subject: str
    value: str
    advice: str = ""
    """What to do; "": nothing."""
    is_needed: bool = True
    """Whether advice is about something that the project cannot do without."""

    @property
    def is_wrong(self) -> bool:
        return bool(self.advice) and self.is_needed


class Requirements(NamedTuple):
    """What the project asks for."""

    origin: str
    python: SpecifierSet
    needed: list[Requirement]
    optional: dict[str, list[Requirement]]
    """Of each of EXTRAS, without what is needed anyway."""


def read_requirements() -> Requirements:
    """Return the ranges that the installed project names; those in pyproject.toml beside the package if it is not.

    Raises:
        FileNotFoundError: there is neither.
    """
    try:
        found = metadata.metadata(PROJECT)
    except metadata.PackageNotFoundError:
        return _read_pyproject()
    every = [Requirement(line) for line in metadata.requires(PROJECT) or []]
    needed = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    optional = {
        extra: [one for one in every if one not in needed and one.marker.evaluate({"extra": extra})] for extra in EXTRAS
    }
    return Requirements("the installed project", SpecifierSet(found["Requires-Python"] or ""), needed, optional)


def _read_pyproject() -> Requirements:
    if not PYPROJECT.is_file():
        raise FileNotFoundError(
            f"{PROJECT} is not installed and there is no {PYPROJECT.name} beside the package, so that no range of "
            "versions is known; run `pip install -e .` in a clone."
        )
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    return Requirements(
        PYPROJECT.name,
        SpecifierSet(project["requires-python"]),
        [Requirement(line) for line in project["dependencies"]],
        {extra: [Requirement(line) for line in extras.get(extra, [])] for extra in EXTRAS},
    )


def check_libraries(requirements: Requirements) -> list[Finding]:
    """Return a finding for Python and for each library: its version, and what to do where that is out of range."""
    version, wanted = platform.python_version(), requirements.python
    advice = "" if wanted.contains(version, prereleases=True) else f"make a virtual environment of a Python {wanted}"
    findings = [Finding("Python", f"{version} ({wanted})", advice)]
    findings += [_check_library(one) for one in requirements.needed]
    return findings + [_check_library(one, extra) for extra, some in requirements.optional.items() for one in some]


def absent_libraries(requirements: Requirements) -> list[str]:
    """Return the names of the needed libraries that are not installed."""
    return [one.name for one in requirements.needed if _version(one.name) is None]


def _check_library(wanted: Requirement, extra: str = "") -> Finding:
    found, is_needed = _version(wanted.name), not extra
    if found is None:
        command = f'pip install "{wanted.name}{wanted.specifier}"' if is_needed else f'pip install -e ".[{extra}]"'
        return Finding(wanted.name, f"absent ({wanted.specifier})", command, is_needed)
    is_in_range = wanted.specifier.contains(found, prereleases=True)  # a local or preview build is judged by its number
    advice = "" if is_in_range else f'pip install "{wanted.name}{wanted.specifier}"'
    return Finding(wanted.name, f"{found} ({wanted.specifier})", advice, is_needed)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
