"""Command lines: every right form is read, every wrong one is answered with the nearest right one."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fastdllm import cli

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Optimizer."""

    learning_rate: float = 1e-3
    """Peak, above 0."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A run."""

    name: str = "x"
    """Of the run."""
    max_steps: int = 10
    """Optimizer steps, 1 or more."""
    fresh: bool = False
    """Start anew."""
    force: str = field(default="", metadata={"bare": "all"})
    """Cells to run again."""
    mode: Literal["a", "b"] = "a"
    """One of two."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be 1 or more, got {self.max_steps}.")


def test_flags_override_the_file_and_bare_flags_have_their_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 3\nmode: b\ninner:\n  learning_rate: 0.5\n")
    config = cli.parse(Outer, ["--config", str(path), "--max_steps", "5", "--fresh", "--force"])
    assert config == Outer(max_steps=5, fresh=True, force="all", mode="b", inner=Inner(learning_rate=0.5))
    assert cli.parse(Outer, ["--force", "k2", "--fresh", "false"]) == Outer(force="k2")
    assert cli.parse(Outer, []) == Outer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_step", "5"], "unknown flag --max_step; did you mean --max_steps?"),
        (["--learning_rate", "1"], "did you mean --inner.learning_rate?"),
        (["--inner.lerning_rate=1"], "did you mean --inner.learning_rate?"),
        (["--max_steps", "0"], "max_steps must be 1 or more, got 0"),
        (["--max_steps", "many"], "max_steps"),
        (["--mode", "c"], "mode"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_and_says_what_is_right(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Outer, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_key_in_a_file_is_answered_with_the_nearest_one(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("inner:\n  learnin_rate: 0.5\n")
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["--config", str(path)])
    assert f"unknown key inner.learnin_rate in {path}; did you mean inner.learning_rate?" in capsys.readouterr().err


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Outer, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Optimizer steps, 1 or more.", "Peak, above 0.", "Cells to run again.", "--inner.learning_rate"):
        assert words in text


def test_what_is_written_is_read_back(tmp_path):
    config = Outer(name="y", inner=Inner(learning_rate=2e-5))
    path = tmp_path / "run.yaml"
    path.write_text(cli.to_yaml(config))
    assert cli.parse(Outer, ["--config", str(path)]) == config
    assert cli.flatten(config)["inner.learning_rate"] == 2e-5


def test_run_shows_our_messages_in_a_line_and_other_errors_whole(capsys):
    def fails_inside(config):
        from fastdllm.runtime import pick_device

        pick_device("tpu")

    with pytest.raises(SystemExit) as stopped:
        cli.run(Outer, fails_inside, [])
    assert stopped.value.code == 2 and "device must be auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match="elsewhere"):
        cli.run(Outer, lambda config: (_ for _ in ()).throw(ValueError("elsewhere")), [])


def test_a_flag_overrides_the_file_also_where_it_stands_before_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 3\n")
    assert cli.parse(Outer, ["--max_steps", "5", "--config", str(path)]).max_steps == 5
    assert cli.parse(Outer, ["--max_steps", "5", f"--config={path}", "--fresh"]) == Outer(max_steps=5, fresh=True)


def test_a_file_that_is_not_yaml_is_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("name: [")
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["--config", str(path)])
    assert f"{path} is not YAML" in capsys.readouterr().err
    path.write_text("max_steps: 3\ninner:\n")
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["--config", str(path)])
    assert "the section inner" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cofig", "x.yaml"], "unknown flag --cofig; did you mean --config?"),
        (["configs/demo.yaml"], "configs/demo.yaml stands behind no option; did you mean --config configs/demo.yaml?"),
        (["--fresh", "runs/demo", "runs/two"], "runs/two stands behind no option; give it as --NAME VALUE"),
        (["--max_steps", "0,9"], "Parser key \"max_steps\": Expected a <class 'int'>. Got value: 0,9; "),
    ],
)
def test_a_word_without_its_option_is_answered_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Outer, arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-m fastdllm export", "the following arguments are required: run; python -m fastdllm export --help explains"),
        ("-m fastdllm export runs/demo", "runs/demo stands behind no option; did you mean --run runs/demo?"),
        ("-m fastdllm doctr", "got 'doctr' (did you mean doctor?)"),
        ("-S train.py --help", "jsonargparse is not installed for"),
        ("-S train.py --help", "run `. .venv/bin/activate` first"),
    ],
)
def test_a_program_says_how_it_is_called(words, message):
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and not done.stdout and message in done.stderr


def test_the_commands_are_listed_with_what_they_do(capsys):
    def sing(arguments):
        """Sing a song."""

    cli.run_command("choir", {"sing": sing}, ["--help"])
    assert "  sing  Sing a song." in capsys.readouterr().out
    for words in ([], ["sign"]):
        with pytest.raises(SystemExit) as stopped:
            cli.run_command("choir", {"sing": sing}, words)
        assert stopped.value.code == 2 and "Sing a song." in capsys.readouterr().err


@pytest.mark.parametrize("program", ["fastdllm", "fastdllm.demo"])
def test_every_command_says_what_it_does(program):
    done = subprocess.run([sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.split("\n\n")[1].splitlines()
    assert not done.returncode and any(line.split()[0] == "chat" for line in lines)
    assert all(line.endswith(".") and len(line.split()) > 3 for line in lines)


def test_a_place_without_rights_is_named_in_a_line_and_other_faults_of_files_are_shown_whole(tmp_path, capsys):
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit) as stopped:
        cli.run(Outer, lambda config: (tmp_path / "runs" / "demo").mkdir(), [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/runs/demo cannot be used: Not a directory; mend")
    with pytest.raises(OSError, match="too many"):
        cli.run(Outer, lambda config: (_ for _ in ()).throw(OSError(24, "too many")), [])


def test_ctrl_c_ends_without_a_traceback_and_with_the_status_of_shells(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(Outer, lambda config: (_ for _ in ()).throw(KeyboardInterrupt()), [])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"
