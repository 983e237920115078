"""What this machine is, and what the project will do on it, and why."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from fastdllm.data.datamodule import DataConfig
from fastdllm.decoding.fused import takes_triton
from fastdllm.demo.requirements import Finding
from fastdllm.evaluation.sandbox import permit_programs
from fastdllm.runtime import device_name, get_optimal_dtype, memory_bytes
from fastdllm.training.config import TrainConfig

GIB = 2**30
LEAST_DISK_BYTES = GIB  # the demo's run folder and prepared data take a tenth of it
CPU = torch.device("cpu")


def check_devices() -> list[Finding]:
    """Return a finding for each GPU that torch sees, or for the CPU where it sees none."""
    if torch.cuda.is_available():
        return [_check_gpu(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    return [Finding("device", f"{device_name(CPU)}; no GPU that torch sees", _unseen_gpu())]


def _check_gpu(device: torch.device) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    kernels = torch.cuda.get_arch_list()
    advice = ""
    if not _has_kernels(kernels, major, minor):
        advice = f"this torch has kernels for {', '.join(kernels)} alone: install a build with sm_{major}{minor}"
    return Finding(str(device), f"{device_name(device)}, {memory}, compute capability {major}.{minor}", advice)


def _has_kernels(architectures: list[str], major: int, minor: int) -> bool:
    """Return whether one of "sm_80", "sm_90a", "compute_90" runs there: kernels of its generation up to its minor
    number, or intermediate code of an older or equal one. A letter binds code to one GPU."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        own = (int(digits[:-1]), int(digits[-1]))
        if own == (major, minor) or (number == digits and own <= (major, minor) and (kind != "sm" or own[0] == major)):
            return True
    return False


def _unseen_gpu() -> str:
    """Return what to do about a GPU that nvidia-smi lists and torch does not see; "" if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not answer.stdout.startswith("GPU"):
        return ""
    if torch.version.cuda is None:
        return f"nvidia-smi lists a GPU and torch {torch.__version__} is built for CPUs: install a build for CUDA"
    return f"nvidia-smi lists a GPU: look at CUDA_VISIBLE_DEVICES, or get a driver for CUDA {torch.version.cuda}"


def check_choices(device: torch.device) -> list[Finding]:
    """Return what training and decoding will use on `device`, and why."""
    is_cuda = device.type == "cuda"
    training = "FlexAttention, compiled: a GPU"
    if not is_cuda:
        training = "dense masks in torch: FlexAttention has no backward pass on a CPU"
    return [
        Finding("precision", get_optimal_dtype(device)[1]),
        Finding("training attention", training),
        _check_kernels(device),
        Finding("CUDA graphs", "one for each kind and size of pass" if is_cuda else "none: only on a GPU"),
    ]


def _check_kernels(device: torch.device) -> Finding:
    if takes_triton(device):
        is_absent = importlib.util.find_spec("triton") is None
        advice = "pip install triton (torch's builds for CUDA bring it along)" if is_absent else ""
        return Finding("decoding kernels", "Triton: a GPU of compute capability 8.0 or newer", advice)
    if device.type == "cuda":
        return Finding("decoding kernels", "plain torch: Triton has no products below compute capability 8.0")
    return Finding("decoding kernels", "plain torch: Triton's are for GPUs")


def check_storage() -> list[Finding]:
    """Return a finding for main memory and for each folder that the project writes to."""
    memory = f"{memory_bytes(CPU) / GIB:.1f} GiB free, {os.cpu_count()} CPU cores"
    return [
        Finding("main memory", memory),
        *(check_disk(folder) for folder in (TrainConfig.output_dir, DataConfig.cache_dir)),
    ]


def check_disk(folder: str, needed: int = LEAST_DISK_BYTES) -> Finding:
    """Return a finding for the disk of a folder, which need not be there yet; `needed` is in bytes."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free, advice = shutil.disk_usage(place).free, ""
    if free < needed:
        advice = f"{needed / GIB:.1f} GiB are needed: make room, or name a folder on another disk"
    if not os.access(place, os.W_OK):
        advice = f"{place.name or place} cannot be written to: change its rights, or name another folder"
    return Finding(f"disk at {folder}", f"{free / GIB:.1f} GiB free", advice)


def check_extras() -> list[Finding]:
    """Return a finding for each thing that only some evaluations need."""
    return [
        _tried("sandbox", "programs of a model run isolated (code tasks)", _enter_sandbox),
        _tried("nltk punkt_tab", "present (ifeval)", _find_sentences),
    ]


def _tried(subject: str, value: str, check: Callable[[], None]) -> Finding:
    """Return a finding with `value`, or with what the check's error says to do."""
    try:
        check()
    except (RuntimeError, FileNotFoundError, ModuleNotFoundError) as error:
        return Finding(subject, "absent", str(error), is_needed=False)
    return Finding(subject, value)


def _enter_sandbox() -> None:
    with permit_programs():
        pass


def _find_sentences() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError('lm-eval is absent, and nltk comes with it: pip install -e ".[eval]"')
    from fastdllm.evaluation.tasks import need_sentences

    need_sentences(offline="here")  # any folder: nothing is downloaded
