"""The doctor names what is here and why, each problem with a way out, and says by its status whether one is grave."""

import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from packaging.requirements import Requirement
from transformers import Qwen2Config

from fastdllm.cli import to_yaml
from fastdllm.data.datamodule import DataConfig
from fastdllm.demo import doctor, fit, machine, requirements
from fastdllm.demo.requirements import Finding, check_libraries, read_requirements
from fastdllm.runtime import get_optimal_dtype, pick_device
from fastdllm.training.config import TrainConfig
from fastdllm.training.lora import LoraSettings
from fastdllm.training.strategies import StrategyName

GPUS = {
    "A40": ("NVIDIA A40", (8, 6), 44.4),
    "V100": ("Tesla V100-SXM2-32GB", (7, 0), 31.7),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 79.2),
}
ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
QWEN_1_5B = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
QWEN_1_5B |= dict(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture
def make_gpu(monkeypatch):
    """Make torch believe in one GPU of a kind, or several."""

    def make(kind: str, count: int = 1, has_triton: bool = True) -> torch.device:
        name, capability, gibibytes = GPUS[kind]
        sizes = (int(gibibytes * machine.GIB), int((gibibytes + 0.8) * machine.GIB))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: sizes)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)
        found = SimpleNamespace() if has_triton else None
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: found)
        return torch.device("cuda")

    return make


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with the config of a 1.5B, without weights, and training data of one row."""
    folder = tmp_path_factory.mktemp("source")
    Qwen2Config(**QWEN_1_5B, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(folder)
    (folder / "a.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}))
    return folder


@pytest.fixture
def make_config(source, tmp_path):
    def make(**changes) -> TrainConfig:
        fields = dict(name="big", checkpoint=str(source), max_steps=1907, recompute="selective", micro_batch_size=4)
        fields |= dict(output_dir=str(tmp_path), data=DataConfig(path=str(source / "a.jsonl"), cache_dir=str(tmp_path)))
        return TrainConfig(**fields | changes)

    return make


def texts(findings):
    return {finding.subject: finding.value for finding in findings}


def test_this_machine_is_described_for_real(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    printed = capsys.readouterr().out
    assert end.value.code == int("!!" in printed)
    assert get_optimal_dtype(pick_device())[1] in printed
    lines = {line[3:27].strip(): line[28:] for line in printed.splitlines()}
    assert lines["torch"].startswith(torch.__version__)
    assert "GiB free" in lines["main memory"] and "GiB free" in lines["disk at runs"]
    assert {
        "precision",
        "training attention",
        "decoding kernels",
        "sandbox",
        "nltk punkt_tab",
        "lm-eval",
    } <= lines.keys()


def test_a_cpu_gets_plain_torch_in_float32(no_gpu):
    chosen = texts(machine.check_choices(torch.device("cpu")))
    assert chosen["precision"].startswith("float32") and chosen["CUDA graphs"].startswith("none")
    assert chosen["training attention"].startswith("dense") and chosen["decoding kernels"].startswith("plain torch")


@pytest.mark.parametrize(
    ("kind", "precision", "kernels"),
    [
        ("A40", "bfloat16", "Triton"),
        ("V100", "float16 with loss scaling", "plain torch"),
        ("H100", "bfloat16", "Triton"),
    ],
)
def test_a_gpu_gets_what_its_generation_can(make_gpu, kind, precision, kernels):
    device = make_gpu(kind)
    (finding,) = machine.check_devices()
    name, (major, minor), gibibytes = GPUS[kind]
    assert name in finding.value and f"{gibibytes:.1f} of" in finding.value and f"{major}.{minor}" in finding.value
    findings = machine.check_choices(device)
    chosen = texts(findings)
    assert chosen["precision"].startswith(precision) and chosen["decoding kernels"].startswith(kernels)
    assert chosen["training attention"].startswith("FlexAttention")
    assert chosen["CUDA graphs"].startswith("one") and not any(one.is_wrong for one in (finding, *findings))


def test_triton_is_needed_where_kernels_are_triton_s(make_gpu):
    for kind, is_wrong in (("A40", True), ("V100", False)):
        findings = machine.check_choices(make_gpu(kind, has_triton=False))
        assert [one.subject for one in findings if one.is_wrong] == ["decoding kernels"] * is_wrong


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_75", "sm_80"], (7, 0), False),
        (["sm_75", "sm_80"], (8, 6), True),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_90", "sm_120"], (12, 0), True),
    ],
)
def test_torch_needs_kernels_for_the_gpu(make_gpu, monkeypatch, architectures, capability, runs):
    make_gpu("H100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    (finding,) = machine.check_devices()
    assert finding.is_wrong != runs and (runs or "install a build with sm_" in finding.advice)


@pytest.mark.parametrize(
    ("answer", "cuda", "advice"),
    [
        ('echo "GPU 0: NVIDIA A40"', None, "is built for CPUs: install a build for CUDA"),
        ('echo "GPU 0: NVIDIA A40"', "12.8", "CUDA_VISIBLE_DEVICES, or get a driver for CUDA 12.8"),
        ('echo "No devices"; exit 6', None, ""),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_named(no_gpu, monkeypatch, tmp_path, answer, cuda, advice):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (finding,) = machine.check_devices()
    assert finding.is_wrong == bool(advice) and advice in finding.advice


def test_a_disk_without_room_or_rights_is_named(tmp_path, monkeypatch):
    assert not machine.check_disk(str(tmp_path / "not" / "yet")).advice
    assert "make room" in machine.check_disk(str(tmp_path), needed=2**60).advice
    monkeypatch.setattr(machine.os, "access", lambda place, mode: False)
    assert "cannot be written to" in machine.check_disk(str(tmp_path)).advice


def fake_pyproject(folder, dependencies, python=">=3.11"):
    file = folder / "pyproject.toml"
    lines = [f'requires-python = "{python}"', f"dependencies = {dependencies}"]
    extras = ["[project.optional-dependencies]", 'eval = ["absent-extra>=1"]', 'serve = ["absent-server>=1"]']
    file.write_text("\n".join(["[project]", *lines, *extras]))
    return file


def without_metadata(name):
    raise requirements.metadata.PackageNotFoundError(name)


@pytest.fixture
def pyproject(tmp_path, monkeypatch):
    """Have ranges read from a pyproject.toml with these dependencies."""

    def use(dependencies, **options):
        monkeypatch.setattr(requirements.metadata, "metadata", without_metadata)
        monkeypatch.setattr(requirements, "PYPROJECT", fake_pyproject(tmp_path, dependencies, **options))

    return use


def test_versions_out_of_range_say_what_to_install(pyproject):
    pyproject(["torch>=99", "packaging>=1"], python=">=3.99")
    python, torch_line, packaging_line, *extras = check_libraries(read_requirements())
    assert python.is_wrong and "3.99" in python.advice
    assert torch_line == Finding("torch", f"{torch.__version__} (>=99)", 'pip install "torch>=99"')
    assert not packaging_line.advice
    assert not any(extra.is_wrong for extra in extras)
    assert [extra.advice for extra in extras] == ['pip install -e ".[eval]"', 'pip install -e ".[serve]"']


def test_an_absent_library_ends_the_look_around(pyproject, capsys):
    pyproject(["torch>=2", "absent-library>=1,<2"])
    with pytest.raises(SystemExit, match="1"):
        doctor.main([])
    printed = capsys.readouterr().out
    assert "!! absent-library" in printed and '-> pip install "absent-library<2,>=1"' in printed
    assert "devices" not in printed and "1 to mend" in printed


def test_the_installed_project_s_ranges_come_first(tmp_path, monkeypatch):
    folder = tmp_path / "fastdllm-9.9.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: fastdllm", "Version: 9.9", "Requires-Python: >=3.10"]
    lines += ["Requires-Dist: torch>=2", 'Requires-Dist: lm-eval>=0.4; extra == "eval"']
    lines += ['Requires-Dist: uvicorn; extra == "serve"']
    lines += ['Requires-Dist: pytest; extra == "dev"', 'Requires-Dist: winonly; sys_platform == "win32"']
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = read_requirements()
    assert (found.origin, str(found.python)) == ("the installed project", ">=3.10")
    assert found.needed == [Requirement("torch>=2")]
    assert {extra: [one.name for one in some] for extra, some in found.optional.items()} == {
        "eval": ["lm-eval"],
        "serve": ["uvicorn"],
    }


def test_without_any_ranges_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(requirements.metadata, "metadata", without_metadata)
    monkeypatch.setattr(requirements, "PYPROJECT", tmp_path / "pyproject.toml")
    with pytest.raises(FileNotFoundError, match="pip install -e ."):
        read_requirements()
    sections, _ = doctor._check_versions()
    assert [one.is_wrong for one in sections["versions"]] == [True]


def test_a_run_that_fits_an_h100_is_told_in_parts_hours_and_disk(make_gpu, make_config):
    make_gpu("H100")
    findings = fit.check_run(make_config())
    told = texts(findings)
    assert not any(finding.advice for finding in findings if not finding.subject.startswith(("run folder", "disk")))
    assert told["setup"] == "1 x NVIDIA H100 80GB HBM3, auto, bf16"
    assert told["checkpoint"].endswith("1,543.7M parameters")
    # 4, 4 and 8 bytes a parameter; kept values as in test_preflight; head 0.23 G weights of 6 bytes and 0.2 G logits
    parts = (
        "57.5 GiB a device = weights 5.8 + gradients 5.8 + optimizer 11.5 + activations 30.8 + head 1.7 + reserve 2.0"
    )
    assert told["memory, estimated"] == parts
    assert told["fits"] == "yes: 79.2 GiB free a device"
    assert told["run folder, estimated"].startswith("54.6 GiB = 3 x 17.3 + export")
    hours = float(told["time, estimated"].split()[0])
    assert hours == pytest.approx(1907 * 256 * 2048 / 17_494 / 3600, rel=0.01)  # at the speed of the row
    assert "46.0% of 989 TFLOP/s" in told["  assumed"] and "experiments/01_training_throughput" in told["  assumed"]


def test_strategies_are_compared_and_what_does_not_fit_stands_in_brackets(make_gpu, make_config):
    make_gpu("A40")
    told = texts(fit.check_run(make_config()))
    assert told["  auto"].split() == ["(57.5)"]
    ddp, stage_3 = told["  ddp"].split(), told["  deepspeed_stage_3"].split()
    assert ddp == ["(63.2)"] * 3
    assert len(stage_3) == 3 and float(stage_3[-1]) < GPUS["A40"][2]


def test_low_rank_updates_are_not_divided(make_gpu, make_config):
    make_gpu("A40")
    told = texts(fit.check_run(make_config(lora=LoraSettings(rank=4))))
    assert [name for name in told if name.startswith("  ") and name.strip() in get_args(StrategyName)] == [
        "  auto",
        "  ddp",
    ]


def test_a_run_that_does_not_fit_says_what_would_and_fails(make_gpu, make_config, tmp_path, capsys, monkeypatch):
    make_gpu("A40")
    monkeypatch.setattr(machine, "check_extras", lambda: [])
    (tmp_path / "run.yaml").write_text(to_yaml(make_config()))
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["--config", str(tmp_path / "run.yaml")])
    advice = capsys.readouterr().out.split("!! fits")[1].splitlines()[1]
    assert "needs about 57.5 GiB a device, and NVIDIA A40 has 44.4 GiB free" in advice
    assert "This would fit: --micro_batch_size 2." in advice
    with pytest.raises(SystemExit):  # what it says is true
        doctor.main(["--config", str(tmp_path / "run.yaml"), "--micro_batch_size", "2"])
    assert "fits                     yes: 44.4 GiB free" in capsys.readouterr().out


def test_hours_are_not_guessed_where_nothing_was_measured(make_gpu, make_config, no_gpu):
    assert "not estimated" in texts(fit.check_run(make_config(global_batch_size=4)))["time"]
    for kind, changes in (("V100", {}), ("H100", {"precision": "fp32"}), ("H100", {"compile": "none"})):
        make_gpu(kind)
        assert "not estimated" in texts(fit.check_run(make_config(**changes)))["time"]


def test_a_setup_data_and_checkpoint_that_are_not_there_are_said_in_the_run_s_own_words(make_config, no_gpu):
    (setup,) = fit.check_run(make_config(accelerator="cuda"))
    assert setup.is_wrong and "needs a CUDA GPU" in setup.advice
    data, checkpoint = fit.check_run(make_config(checkpoint="not/a/folder", data=DataConfig(path="n.jsonl")))
    assert data.is_wrong and "no file n.jsonl" in data.advice
    assert checkpoint.is_wrong and "does not exist" in checkpoint.advice


def test_the_command_reads_a_config_and_its_flags(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(fit, "check_run", lambda config: seen.append(config) or [Finding("fits", "yes")])
    monkeypatch.setattr(machine, "check_extras", lambda: [])
    with pytest.raises(SystemExit):
        doctor.main(["--config", "configs/demo.yaml", "--micro_batch_size", "2"])
    assert (seen[0].name, seen[0].micro_batch_size) == ("demo", 2)
    assert "the run demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("a", "b"), f"   {'a':<24} b"),
        (Finding("a", "b", "do"), f"!! {'a':<24} b\n     -> do"),
        (Finding("a", "b", "do", is_needed=False), f" - {'a':<24} b\n     -> do"),
    ],
)
def test_a_finding_is_a_line_and_its_advice_another(finding, text):
    assert doctor.describe(finding) == text
