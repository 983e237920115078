"""Running programs that a model wrote: each in a process of its own, behind walls, for a limited time.

What holds for every program, on Linux on x86-64 and ARM64: limits on wall time, CPU time, memory, file size and open
files; no further process; a clean environment; an empty folder to work in, which is gone afterwards; no input, and its
output goes nowhere. What holds besides where the system allows namespaces to the user (`is_isolated`): no network, no
socket of the file system, no other process in sight, and nothing can be written to but that folder.

What is not promised: a program may read any file that the user may read (isolated, it cannot send it anywhere); passed
means that it came to its last line, so a program that is written to deceive rather than to solve can reach it.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox_child.py")
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
GRACE_SECONDS = 60.0  # beyond the wall time until the process that keeps it is given up
FALLBACK = "--allow_network runs them all the same: they then reach the network, your files and your processes"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 20.0
    """Generous, so that a busy machine changes no result: what runs for long runs into cpu_seconds."""
    cpu_seconds: int = 5
    memory_bytes: int = 4 << 30
    """Address space, of which a Python with numpy takes more than it uses."""
    file_bytes: int = 16 << 20
    """Size of a file."""
    folder_bytes: int = 64 << 20
    """All files together, if isolated."""
    open_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    has_passed: bool
    """It came to its last line."""
    reason: str
    """Why not, in a few words; "" where it has passed."""


class SandboxError(RuntimeError):
    """The system does not let us put up a wall."""


@dataclass(frozen=True, kw_only=True)
class Permission:
    """What whoever started this process has allowed."""

    is_isolated: bool
    """False: the system has no namespaces for us, and programs may run without."""


_permission: ContextVar[Permission | None] = ContextVar("permission", default=None)


@contextmanager
def permit_programs(*, allow_network: bool = False) -> Iterator[Permission]:
    """Allow `run_permitted` while the block runs.

    Args:
        allow_network: run programs where the system has no namespaces for us, too.
    Raises:
        SandboxError: the system has none and that is not allowed, or it cannot even limit a program.
    """
    given = Permission(is_isolated=_check_system(allow_network))
    token = _permission.set(given)
    try:
        yield given
    finally:
        _permission.reset(token)


def _check_system(allow_network: bool) -> bool:
    """Return whether programs can be isolated. Raises SandboxError as `permit_programs` does."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"programs of a model are run on Linux only, and this is {sys.platform}.")
    try:
        run_program("pass", is_isolated=True)
        return True
    except SandboxError as error:
        if not allow_network:
            raise SandboxError(f"this system does not let us isolate programs ({error}); {FALLBACK}.") from None
        print(f"programs of the model run without isolation: {error}", flush=True)
    run_program("pass", is_isolated=False)
    return False


def permission() -> Permission:
    """Return what `permit_programs` allows here. Raises PermissionError outside of it."""
    given = _permission.get()
    if given is None:
        raise PermissionError("programs of a model are run only where that was allowed, with --allow_code_execution.")
    return given


def run_permitted(program: str) -> Outcome:
    """Run a program as far as `permit_programs` allows. Raises PermissionError outside of it."""
    return run_program(program, is_isolated=permission().is_isolated)


def run_program(program: str, *, is_isolated: bool, limits: Limits | None = None) -> Outcome:
    """Run a Python program and return how it ended.

    Raises:
        SandboxError: a wall could not be put up; the program was not run.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        job = {"program": program, "token": token, "folder": folder, "is_isolated": is_isolated}
        result = _start({**job, "limits": asdict(limits or Limits())})
    if result["refused"]:
        raise SandboxError(result["refused"])
    has_passed = result["report"] == token
    return Outcome(has_passed=has_passed, reason="" if has_passed else _reason(result))


def _start(job: dict[str, Any]) -> dict[str, Any]:
    """Hand a job to `sandbox_child` in a Python of its own and return its answer."""
    wait = job["limits"]["wall_seconds"] + GRACE_SECONDS
    try:
        child = subprocess.run(
            [sys.executable, "-I", str(CHILD)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=wait,
            cwd=job["folder"],
            env={**ENVIRONMENT, "HOME": job["folder"], "TMPDIR": job["folder"]},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise SandboxError(f"a program's keeper did not answer within {wait:g} s.") from None
    if child.returncode != 0:
        raise SandboxError(f"a program's keeper ended with {child.returncode}: {child.stderr[-500:]}")
    return json.loads(child.stdout)


def _reason(result: dict[str, Any]) -> str:
    if result["is_over_time"]:
        return "over its wall time"
    return result["report"] or (f"ended by {result['signal']}" if result["signal"] else "ended before its last line")
