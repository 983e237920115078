"""Programs that misbehave, behind the walls and without namespaces; nothing of them is mocked."""

import dataclasses
import os
import socket
import sys

import pytest

from fastdllm.evaluation import sandbox
from fastdllm.evaluation.sandbox import Limits, Outcome, SandboxError, permit_programs, run_permitted, run_program

SMALL = Limits(wall_seconds=15, cpu_seconds=1, memory_bytes=1 << 30, file_bytes=1 << 20, folder_bytes=4 << 20)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are run on Linux only")


@pytest.fixture(scope="module")
def namespaces():
    try:
        run_program("pass", is_isolated=True)
    except SandboxError as error:
        pytest.skip(f"no namespaces for this user here: {error}")


@pytest.fixture(params=[True, False], ids=["isolated", "limited"])
def is_isolated(request):
    if request.param:
        request.getfixturevalue("namespaces")
    return request.param


def ended(program, is_isolated, **limits):
    return run_program(program, is_isolated=is_isolated, limits=dataclasses.replace(SMALL, **limits))


PASSED = Outcome(has_passed=True, reason="")


@pytest.mark.parametrize(
    "program",
    [
        "def double(x): return 2 * x\nassert double(2) == 4",
        "print('no token ' * 10**5)\nimport sys; print('x', file=sys.stderr)",
        "import os\nopen('mine', 'w')\nassert os.listdir('.') == os.listdir(os.path.expanduser('~')) == ['mine']",
        "import threading\nthread = threading.Thread(target=print); thread.start(); thread.join()",
        "import os\nassert not {'PYTHONPATH', 'SECRET'} & os.environ.keys()",
        "assert __name__ != '__main__'",  # a program's own demonstration does not run, as in the original metric
    ],
    ids=["right", "prints", "own folder", "thread", "clean environment", "no main"],
)
def test_what_is_allowed_passes(program, is_isolated, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    assert ended(program, is_isolated) == PASSED


@pytest.mark.parametrize(
    "program, reason",
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os; os._exit(0)\nassert False", "ended before its last line"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("x = [0] * 2**28", "MemoryError"),
        ("input()", "EOFError"),
        ("open('much', 'wb').write(bytes(2**21))", "File too large"),
        ("files = [open('/dev/null') for _ in range(65)]", "Too many open files"),
        ("import os; os.fork()", "BlockingIOError"),
        ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
    ],
)
def test_what_fails_or_meets_a_limit_does_not_pass(program, reason, is_isolated):
    outcome = ended(program, is_isolated)
    assert not outcome.has_passed and reason in outcome.reason
    assert len(outcome.reason) <= 200


@pytest.mark.parametrize(
    "program, limits, reason",
    [
        ("while True: pass", {"cpu_seconds": 1}, "ended by SIGKILL"),
        ("import time; time.sleep(60)", {"wall_seconds": 0.5}, "over its wall time"),
    ],
    ids=["computes", "sleeps"],
)
def test_what_never_ends_is_ended(program, limits, reason, is_isolated):
    assert ended(program, is_isolated, **limits) == Outcome(has_passed=False, reason=reason)


def test_a_program_that_floods_whatever_it_can_reach_does_not_hold_us_up(is_isolated):
    flood = "import os\nfor number in range(3, 64):\n  try: os.write(number, b'x' * 10**6)\n  except OSError: pass"
    assert not ended(flood, is_isolated, wall_seconds=0.5).has_passed


def test_its_folder_is_empty_and_gone_afterwards(is_isolated, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(folder))
    assert ended("import os\nassert os.listdir('.') == []\nos.makedirs('a/b')", is_isolated) == PASSED
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("namespaces")
def test_isolated_there_is_no_network_not_even_this_machine(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))"
        assert ended(connect, False) == PASSED  # which shows that there is something to be kept from
        assert "unreachable" in ended(connect, True).reason
    path = str(tmp_path / "door")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        connect = f"import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})"
        assert ended(connect, False) == PASSED
        assert "PermissionError" in ended(connect, True).reason


@pytest.mark.usefixtures("namespaces")
def test_isolated_nothing_outside_its_folder_is_written_or_removed(tmp_path):
    kept = tmp_path / "outside" / "kept"
    kept.parent.mkdir()
    kept.write_text("as it was")
    new = str(kept) + "new"
    for attempt in (f"open({str(kept)!r}, 'w')", f"os.remove({str(kept)!r})", f"open({new!r}, 'w')"):
        assert "Read-only" in ended(f"import os\n{attempt}", True).reason
    remount = "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None) == 0"
    assert "AssertionError" in ended(remount, True).reason
    assert [path.name for path in kept.parent.iterdir()] == ["kept"] and kept.read_text() == "as it was"
    fill = "for number in range(9):\n  open(str(number), 'wb').write(bytes(2**19))"
    assert "No space left" in ended(fill, True).reason


@pytest.mark.usefixtures("namespaces")
def test_isolated_no_other_process_is_in_sight():
    assert "ProcessLookupError" in ended(f"import os; os.kill({os.getpid()}, 0)", True).reason
    assert ended("import os\nassert os.getpid() == 1 and os.listdir('/proc') == []", True) == PASSED


def test_without_permission_nothing_runs(namespaces):
    with pytest.raises(PermissionError, match="--allow_code_execution"):
        run_permitted("pass")
    with permit_programs() as permission:
        assert permission.is_isolated and run_permitted("pass") == PASSED
    with pytest.raises(PermissionError):
        run_permitted("pass")


def test_without_namespaces_it_is_refused_unless_the_network_is_allowed(monkeypatch, capsys):
    def run(program, *, is_isolated, **limits):
        if is_isolated:
            raise SandboxError("unshare: Operation not permitted")
        return run_program(program, is_isolated=False, **limits)

    monkeypatch.setattr(sandbox, "run_program", run)
    with pytest.raises(SandboxError, match="unshare: Operation not permitted.*--allow_network"), permit_programs():
        pass
    with permit_programs(allow_network=True) as permission:
        assert not permission.is_isolated
        assert "without isolation: unshare: Operation not permitted" in capsys.readouterr().out
        assert run_permitted("x = 1") == PASSED


def test_a_wall_that_cannot_stand_is_an_error_and_the_program_does_not_run(tmp_path):
    limits = Limits(open_files=1 << 40)  # more than the kernel allows anyone
    with pytest.raises(SandboxError, match=r"PermissionError|ValueError|OSError"):
        run_program(f"open({str(tmp_path / 'ran')!r}, 'w')", is_isolated=False, limits=limits)
    assert not (tmp_path / "ran").exists()
