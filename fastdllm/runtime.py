"""What this process runs on: device, precision and why, code revision, versions; files found and written, locks."""

import difflib
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

# Dense peaks in FLOP/s from the vendors' data sheets (no sparsity), matched in this order as whole words of the
# lower-case device name. Lightning's own table mixes dense and sparse figures, so it is not used.
DENSE_BF16_PEAKS = {
    "h200": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h20": 148e12,
    "b200": 2250e12,
    "l40s": 362e12,
    "l4": 121e12,
    "a100": 312e12,
    "a40": 150e12,
    "a10": 125e12,
    "rtx 4090": 165e12,
    "rtx 3090": 71e12,
    "rtx 6000 ada": 364e12,
}
REVISION_FILE = ".revision"
REPORTED_LIBRARIES = ("torch", "lightning", "transformers", "datasets", "deepspeed", "lm_eval", "triton")


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: "auto" (CUDA when present), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: CUDA is asked for and absent, or the name is unknown.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs a CUDA GPU and none is visible; try device cpu.")
    return torch.device(name)


def get_optimal_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the compute dtype for `device` and the reason, for printing."""
    if device.type != "cuda":
        return torch.float32, "float32: the CPU is exact and has no faster small dtype that every machine supports"
    major, minor = torch.cuda.get_device_capability(device)
    capability = f"compute capability {major}.{minor}"
    if (major, minor) >= (8, 0):
        return torch.bfloat16, f"bfloat16: {capability} is 8.0 or newer"
    if (major, minor) >= (7, 0):
        return torch.float16, f"float16 with loss scaling: {capability} has no bfloat16 units (8.0 has)"
    return torch.float32, f"float32: {capability} is older than 7.0, without fast half precision"


def device_name(device: torch.device) -> str:
    """Return a name for rows and tables, such as "NVIDIA H100 80GB HBM3" or "cpu (AMD EPYC, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({models[0] if models else 'unknown'}, {torch.get_num_threads()} threads)"


def clock_mhz(device: torch.device) -> int | None:
    """Return what a GPU's multiprocessors are clocked at now, in MHz, as nvidia-smi says; None elsewhere or without it.

    A GPU that is too hot or short of power lowers it, and with it every speed that is measured meanwhile.
    """
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    query = ["nvidia-smi", f"--id={name}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return int(answer) if answer.isdecimal() else None


def load_average() -> float:
    """Return how many processes of this machine wanted a core, on average over the last minute."""
    return os.getloadavg()[0]


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak in FLOP/s, or None for a device that the table does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((peak for key, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """Return the free memory of the device (CUDA) or of the machine (CPU), in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    available = [line for line in info.read_text().splitlines() if "MemAvailable" in line] if info.exists() else []
    if available:
        return int(available[0].split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def code_revision() -> tuple[str, bool]:
    """Return the commit of this source tree and whether tracked files differ from it.

    A copied tree may name its commit in a file `.revision` ("<commit> dirty" if it differs), which is believed before
    git, because a copy's git folder can be older than its files; without either the commit is "unknown".
    """
    root = Path(__file__).resolve().parent.parent
    if (root / REVISION_FILE).is_file():
        named, *differs = (root / REVISION_FILE).read_text().split()
        return named, bool(differs)
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return (commit, bool(status)) if commit else ("unknown", False)


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git program: the revision is unknown, which the caller reports
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that results depend on."""
    versions = {}
    for name in REPORTED_LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as write_bytes does, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` aside, sync it to disk and rename it into place, so that no reader sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; what lay there is deleted only after the new one stands."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def lock_file(path: str | Path) -> Iterator[str]:
    """Try to lock the file for this process: "" if it is ours while the block runs, else who holds it.

    The lock goes with the process, however that ends. Its holder may delete the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file, is_ours = _open_locked(path)
    with file:
        if is_ours:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            yield ""
        else:
            file.seek(0)
            yield file.read().strip() or "another process"


def _open_locked(path: Path) -> tuple[TextIO, bool]:
    """Return the file, open, and whether this process holds its lock now."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file, False
        if _is_still_at(path, file):
            return file, True
        file.close()  # its holder deleted it between our opening and locking it: others would lock a new one


def _is_still_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def nearest_folder(path: Path) -> str:
    """Return a question after the folder beside `path` that is spelt most like it; "": there is none."""
    can_look = path.parent.is_dir() and os.access(path.parent, os.R_OK)
    beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if can_look else []
    names = difflib.get_close_matches(path.name, beside, n=1)
    return f" (did you mean {path.parent / names[0]}?)" if names else ""
