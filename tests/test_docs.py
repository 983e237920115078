"""What the pages show works: small commands run, others are parsed by their own programs, Python prints what is said.

Commands run in a copy of the repository. What can be neither run nor parsed here is named below, with the reason.
"""

import contextlib
import io
import re
import runpy
import shutil
import subprocess
import sys

import lm_eval.__main__
import pytest
from pages import PAGES, ROOT, Command, blocks, commands, page_name

from fastdllm import cli
from fastdllm.evaluation.arguments import parse_arguments

TINY = "python evaluate.py --checkpoint data/tiny-adapted"
BEFORE = {  # what other commands need, in this order; with what makes it small
    "python data/word_problems/problems.py": "--num_train 60 --num_validation 20 --num_test 5",
    "python train.py --config configs/demo.yaml": "--max_steps 2 --data.validation_samples 1",
    "python -m fastdllm distill --checkpoint data/tiny --data.path data/tiny/test.jsonl --data.limit 4 --keep right "
    "--output own.jsonl": "",
}
RUN = {  # commands that end in seconds as they stand or with these options
    "python train.py --help": "",
    "python evaluate.py --help": "",
    "python -m fastdllm inspect-data --config configs/demo.yaml": "--rows 1",
    "python -m fastdllm doctor --config configs/demo.yaml": "",
    "python -m fastdllm export --run runs/demo": "",
    "python -m fastdllm curves --runs [runs/demo] --output demo.png": "",
    "python -m fastdllm.evaluation.plots": "",
    "python evaluate.py --grid --status": "",
    f"{TINY} --threshold 0.9": "--limit 2",
    "python evaluate.py --grid --dry_run": "",
    "python evaluate.py --reuse_k 2 --subset first": "--limit 2 --max_new_tokens 32",
    f"{TINY} --axes.policy [threshold,factor,profile,entropy,margin,fixed]": "--limit 1 --max_new_tokens 32",
    f"{TINY} --threshold 1.0 --reuse_k 2 --subset middle --reuse_mode delta": "--limit 1 --max_new_tokens 32",
    f"{TINY} --threshold 1.0 --schedule adaptive --reuse_mode delta --subset last --budget 0.3": "--limit 1",
    "python train.py --config configs/demo.yaml --name own --data.path own.jsonl": "--max_steps 1",
    "python benchmarks/check_published.py --checkpoint data/tiny-adapted": "--num_prompts 2 --max_new_tokens 32",
}
NOT_RUN = {  # by the program: why it is neither run nor parsed
    **dict.fromkeys(("sinfo", "squeue", "sacct", "salloc", "scontrol"), "needs a Slurm controller"),
    ".": "needs the .venv of make demo",
    "curl": "needs a server; its body is that of the example in Python",
    "pace-quota": "is a program of PACE",
    "ssh": "needs another machine",
    "tail": "needs a job's log",
    "tensorboard": "is a server; that a run's events can be read is tested by the command curves",
}
STAND_INS = {"--strategy NAME": "--strategy ddp"}  # for what a page leaves to the reader, where any word will not do
PYTHON_PAGES = [path for path in PAGES if path.name != "README.md" and "```python" in path.read_text()]
SHOWN = list(dict.fromkeys(command for path in PAGES for command in commands(path)))


class Parsed(Exception):
    """A command's options were read without an error."""


def parse_and_stop(parse):
    def stop(config_class, argv=None):
        raise Parsed(parse(config_class, argv))

    return stop


@pytest.fixture
def parsing(monkeypatch):
    """Programs end where they have read their options."""
    monkeypatch.setattr(cli, "parse", parse_and_stop(cli.parse))
    monkeypatch.setattr(lm_eval.__main__.HarnessCLI, "execute", check_harness_arguments)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def check_harness_arguments(_, arguments):
    model = arguments.model_args
    parse_arguments(model if isinstance(model, dict) else dict(pair.split("=", 1) for pair in model.split(",")))
    raise Parsed(arguments)


def run_python(words):
    """Run `python WORDS` inside this process, where everything heavy is imported already."""
    program = words[1] if words[0] == "-m" else words[0]
    sys.argv = [program, *words[2 if words[0] == "-m" else 1 :]]
    if program == "fastdllm.evaluation.harness":  # lm-eval takes each model once, and this one is registered
        lm_eval.__main__.cli_evaluate()
    elif words[0] == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def check_python(words):
    try:
        run_python(words)
    except (Parsed, SystemExit) as end:
        assert isinstance(end, Parsed) or not end.code, f"refused with status {end.code}"
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("needs Triton, which PyTorch brings along where there is a GPU")
    else:
        pytest.fail("did not read its options by fastdllm.cli; list it in RUN")


def check_make(words):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) - {word for word in words if "=" in word} <= set(targets)
    subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)


def check_sourced(words):
    subprocess.run(["bash", "-n", *words], cwd=ROOT, check=True)


def check_pytest(words):
    for word in words:
        assert word.startswith("-") or not re.search("[/.]", word) or (ROOT / word).exists(), f"no {word}"


def check_sbatch(words):
    """Check what follows sbatch's own options: the script, and the options that it hands on."""
    scripts = [place for place, word in enumerate(words) if word.endswith((".sbatch", ".sh"))]
    if not scripts:  # options alone, to be added to a command shown elsewhere
        return
    script, *arguments = words[scripts[0] :]
    if script != "sbatch/train.sbatch":
        check_script(script, arguments)
    elif arguments:  # without any the text says that they are to be added
        check_python(["train.py", *arguments])


def check_script(script, arguments):
    """Check options against what the script's --help shows, and those behind -- by evaluate.py, which gets them."""
    usage = subprocess.run(["bash", script, "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    own, passed = arguments, []
    if "--" in arguments:
        own, passed = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    unknown = {word for word in own if word.startswith("--")} - set(re.findall(r"--[\w-]+", usage))
    assert not unknown, f"{script} --help shows no {', '.join(sorted(unknown))}"
    if passed:
        check_python(["evaluate.py", *passed])


CHECKS = {
    "python": check_python,
    "make": check_make,
    "source": check_sourced,
    "pytest": check_pytest,
    "sbatch": check_sbatch,
}


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


@pytest.mark.parametrize("command", [command for command in SHOWN if command.text not in BEFORE | RUN], ids=name)
def test_a_command_is_valid(command, parsing, monkeypatch):
    program, *words = command.words
    if program in NOT_RUN:
        return
    assert program in CHECKS or program.endswith((".sh", ".py")), (
        f"{command.page} shows {command.text!r}: run it, check it, or say why not"
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    for written, meant in STAND_INS.items():
        if written in command.text:
            words[words.index(written.split()[1])] = meant.split()[1]
    if program.endswith(".py"):
        program, words = "python", [program, *words]
    CHECKS[program](words) if program in CHECKS else check_script(program, words)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with a run in it, trained by the commands that the pages show."""
    folder = tmp_path_factory.mktemp("copy") / "fastdllm"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "prepared", "tiny-source", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        for text, options in BEFORE.items():
            run_python([*text.split()[1:], *options.split()])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("text", RUN, ids=str)
def test_a_command_runs(text, copy, monkeypatch):
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", sys.argv)
    try:
        run_python([*text.split()[1:], *RUN[text].split()])
    except SystemExit as end:
        assert not end.code


def test_what_is_run_or_left_out_is_shown_on_a_page():
    texts, programs = {command.text for command in SHOWN}, {command.words[0] for command in SHOWN}
    assert set(BEFORE | RUN) <= texts, f"shown nowhere: {set(BEFORE | RUN) - texts}"
    assert set(NOT_RUN) <= programs, f"shown nowhere: {set(NOT_RUN) - programs}"
    assert all(any(written in text for text in texts) for written in STAND_INS)


@pytest.mark.parametrize("path", PYTHON_PAGES, ids=page_name)
def test_a_page_s_python_prints_what_the_block_behind_it_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [*blocks(path.read_text()), ("", "")]
    for (language, code), (following, output) in zip(shown, shown[1:], strict=False):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page_name(path), "exec"), {})
            assert following == "text" and printed.getvalue() == output
