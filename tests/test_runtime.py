"""What the process runs on, and files written safely."""

import os
import subprocess
import sys

import pytest
import torch

from fastdllm import runtime


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_the_dtype_follows_the_compute_capability_and_says_why(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, reason = runtime.get_optimal_dtype(torch.device("cuda"))
    assert chosen == dtype and f"{capability[0]}.{capability[1]}" in reason
    assert runtime.get_optimal_dtype(torch.device("cpu"))[0] == torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("Quadro RTX 6000", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peaks_are_dense_and_unknown_devices_have_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda")) == peak
    assert runtime.peak_flops(torch.device("cpu")) is None


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        runtime.pick_device("cuda:1")
    with pytest.raises(ValueError, match="must be auto"):
        runtime.pick_device("gpu")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows" / "a.json"
    runtime.write_text(path, "first")

    def fails(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(runtime.os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        runtime.write_text(path, "second")
    assert path.read_text() == "first"


def test_facts_about_this_process_are_there():
    commit, is_dirty = runtime.code_revision()
    assert commit == "unknown" or len(commit) == 40
    assert isinstance(is_dirty, bool)
    assert runtime.library_versions()["torch"] == torch.__version__
    assert runtime.memory_bytes(torch.device("cpu")) > 2**20
    assert runtime.device_name(torch.device("cpu")).startswith("cpu (")


def test_a_copied_tree_names_its_revision_in_a_file(tmp_path, monkeypatch):
    package = tmp_path / "fastdllm"
    package.mkdir()
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert runtime.code_revision() == ("unknown", False)
    (tmp_path / ".revision").write_text("0123abc dirty\n")
    assert runtime.code_revision() == ("0123abc", True)


def test_a_locked_file_names_its_holder_and_is_free_again_when_the_holder_is_killed(tmp_path):
    path = tmp_path / "some" / "lock"
    code = f"import time, fastdllm.runtime as r\nwith r.lock_file({str(path)!r}) as h: print(h or 'ours', flush=True)"
    code += "; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ours\n"
        with runtime.lock_file(path) as holder:
            assert holder.startswith(f"process {other.pid} on ")
        other.kill()
    with runtime.lock_file(path) as holder:
        assert holder == ""
        with runtime.lock_file(path) as second:
            assert str(os.getpid()) in second


def test_a_lock_file_that_its_holder_deleted_locks_nothing(tmp_path, monkeypatch):
    path, opened = tmp_path / "lock", []

    def flock(file, operation):
        opened.append(file)
        if len(opened) == 1:  # the holder lets go between our opening and locking
            path.unlink()

    monkeypatch.setattr(runtime.fcntl, "flock", flock)
    with runtime.lock_file(path) as holder:
        assert holder == "" and len(opened) == 2 and path.exists()


def test_a_cpu_has_no_gpu_clock_and_the_gpus_is_read_by_its_name(monkeypatch, tmp_path):
    assert runtime.clock_mhz(torch.device("cpu")) is None
    properties = type("Properties", (), {"uuid": "12ab"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *GPU-12ab*clocks.sm*) echo " 1980" ;; *) echo "[N/A]" ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.clock_mhz(torch.device("cuda")) == 1980
    properties.uuid = "other"
    assert runtime.clock_mhz(torch.device("cuda")) is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert runtime.clock_mhz(torch.device("cuda")) is None
