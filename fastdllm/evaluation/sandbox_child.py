"""What runs in the process that `sandbox.run_program` starts: the walls are put up here, then the program runs.

Standard library alone, because Python runs this as a file, without our package on its path. The process that begins
here stays outside the walls, as the parent of the one that runs the program: it keeps the time, kills, and reports.
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from typing import Any, NoReturn

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CAPABILITY_VERSION = 0x20080522
# How seccomp names an architecture, and its numbers of the system calls that make a process or a socket.
CALLS = {
    "x86_64": (0xC000003E, {"fork": 57, "vfork": 58, "clone": 56, "socket": 41}),
    "aarch64": (0xC00000B7, {"clone": 220, "socket": 198}),
}
CLONE3, IO_URING_SETUP, X32_CALLS = 435, 425, 0x40000000
CLONE_THREAD, AF_UNIX = 0x10000, 1
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of a filter
AT_NUMBER, AT_ARCHITECTURE, AT_FIRST_ARGUMENT = 0, 4, 16  # bytes into what a filter reads
ALLOW, REFUSE = 0x7FFF0000, 0x50000  # REFUSE is added to the error's number
EPERM, EAGAIN, ENOSYS = 1, 11, 38
REPORT_BYTES = 4096
libc = ctypes.CDLL(None, use_errno=True)

Rule = tuple[int, int, int, int]
"""Instruction, rules to pass over if true and if false, value."""


def main() -> None:
    """Read a job from standard input, run its program, and write what happened to standard output, both JSON."""
    job = json.load(sys.stdin)
    try:
        if job["is_isolated"]:
            isolate(job["folder"], job["limits"]["folder_bytes"])
        result = run(job)
    except OSError as error:
        result = {"refused": str(error)}
    json.dump(result, sys.stdout)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's program in a child and return its report, or `refused` with the wall that could not be put up."""
    (ready, tell_ready), (reader, writer) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        prepare(job, tell_ready)
        run_inside(job, writer)
    os.close(tell_ready)
    os.close(writer)
    refused = os.read(ready, REPORT_BYTES).decode(errors="replace")  # nothing, at once, where all walls stand
    is_in_time = select.select([os.pidfd_open(child)], [], [], job["limits"]["wall_seconds"])[0]
    os.kill(child, signal.SIGKILL)  # with the first process of its namespace everything in it ends
    _, status = os.waitpid(child, 0)
    os.set_blocking(reader, False)
    try:
        report = os.read(reader, REPORT_BYTES).decode(errors="replace")
    except BlockingIOError:  # something that it left behind still holds the pipe
        report = ""
    number = os.WTERMSIG(status) if is_in_time and os.WIFSIGNALED(status) else 0
    ended = signal.Signals(number).name if number else ""
    return {"refused": refused, "report": report, "is_over_time": not is_in_time, "signal": ended}


def prepare(job: dict[str, Any], tell_ready: int) -> None:
    """Put up the walls around this one process and close `tell_ready`; where one cannot stand, say so and end."""
    try:
        os.setsid()
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.chdir(job["folder"])
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        drop_privileges()
        set_limits(job["limits"])
        forbid_processes(platform.machine(), is_isolated=job["is_isolated"])
    except BaseException as error:
        os.write(tell_ready, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.close(tell_ready)


def run_inside(job: dict[str, Any], writer: int) -> NoReturn:
    """Run the program, report the job's token if it came to its last line and else why not, and end."""
    try:
        exec(compile(job["program"], "<program>", "exec"), {})
        report = job["token"]
    except BaseException as error:  # SystemExit too: tests that were not reached did not pass
        report = f"{type(error).__name__}: {error}"[:200]
    os.write(writer, report.encode(errors="replace"))
    os._exit(0)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError with its name where it fails."""
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if getattr(libc, name)(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def isolate(folder: str, folder_bytes: int) -> None:
    """Enter namespaces of our own. From the next fork on no other process is there; there is no network; nothing can be
    written to but `folder`, which becomes an empty file system in memory; /proc is empty.

    Raises:
        OSError: the system refuses.
    """
    user, group = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    read_only = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only))
    call("mount", b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, None)
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, f"size={folder_bytes}".encode())


def drop_privileges() -> None:
    """Give up every capability, also those over our own namespaces, for good."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))


def set_limits(limits: dict[str, int]) -> None:
    """Set what the kernel holds us to; at the limit of CPU time it kills."""
    for name, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def forbid_processes(machine: str, *, is_isolated: bool) -> None:
    """Let the kernel refuse new processes (threads are allowed) and, if isolated, the sockets of the file system.

    RLIMIT_NPROC would not do: the kernel does not apply it to root.
    """
    if machine not in CALLS:
        raise OSError(ENOSYS, f"no filter of system calls is known for {machine}")
    architecture, numbers = CALLS[machine]
    rules = [
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, REFUSE + ENOSYS),
        (LOAD, 0, 0, AT_NUMBER),
        (AT_LEAST, 0, 1, X32_CALLS),
        (RETURN, 0, 0, REFUSE + ENOSYS),
        *refuse(CLONE3, ENOSYS),  # its flags are out of a filter's reach; libraries then use clone
        *refuse(IO_URING_SETUP, ENOSYS),  # the way around a filter
    ]
    for name in ("fork", "vfork"):
        rules += refuse(numbers[name], EAGAIN) if name in numbers else []
    argument = [(LOAD, 0, 0, AT_FIRST_ARGUMENT)]
    is_thread = [(ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSE + EAGAIN), (RETURN, 0, 0, ALLOW)]
    is_unix = [(EQUAL, 0, 1, AF_UNIX), (RETURN, 0, 0, REFUSE + EPERM), (RETURN, 0, 0, ALLOW)]
    rules += [(EQUAL, 0, 4, numbers["clone"]), *argument, *is_thread]
    rules += [(EQUAL, 0, 4, numbers["socket"]), *argument, *is_unix] if is_isolated else []
    rules.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    call(
        "prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)), 0, 0
    )


def refuse(number: int, error: int) -> list[Rule]:
    """Return the rules that answer the system call `number` with an error."""
    return [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE + error)]


if __name__ == "__main__":
    main()
