"""The evaluation scripts without a Slurm: what they ask evaluate.py and sbatch for, and what they refuse."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from evaluation.rows import cell, fake_row
from training.conftest import ROOT

from fastdllm.evaluation.results import write_row
from fastdllm.evaluation.sweep import GRID, make_cells, points, status_lines

REUSE, SINGLE, PACE, HERE = "run_reuse_experiments.sh", "eval_reuse_single.sh", "eval_pace_script.sh", "eval_script.sh"
RUNNER = "../experiments/00_baseline/sbatch/run.sh"
TOOLS = (
    "awk",
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "grep",
    "head",
    "hostname",
    "mkdir",
    "mv",
    "paste",
    "realpath",
    "rm",
)
TOOLS += ("sed", "sleep", "sort", "touch", "uniq")
RECORD = '#!/usr/bin/env bash\nprintf "%q " "$@" >>"$0.calls"; echo >>"$0.calls"\n'
FAKES = {
    "python": '[[ " $* " != *" --status "* ]] || cat "$0.status"; exec "$0.then"\n',
    "python.then": "",
    "sbatch": "echo 12\n",
    "scontrol": "",
}
GRID_CELLS = "k1 k2_first k2_middle k2_last k3_first k3_middle k3_last"


class Machine:
    """Owns programs that only note their arguments, and a working directory that is not the repository's."""

    def __init__(self, root, folder):
        self.root, self.folder = root, folder
        (folder / "elsewhere").mkdir()
        (folder / "tools").mkdir()
        for tool in TOOLS:
            (folder / "tools" / tool).symlink_to(shutil.which(tool))
        for name, does in FAKES.items():
            self.let(name, does)
        self.write_status()

    def let(self, program, does):
        (self.folder / program).write_text(RECORD + does)
        (self.folder / program).chmod(0o755)

    def environment(self, **changes):
        usual = {"PATH": f"{self.folder}:{self.folder}/tools", "CLUSTER": "local", "TMPDIR": str(self.folder)}
        return {**usual, "FASTDLLM_PYTHON": f"{self.folder}/python", **changes}

    def call(self, script, *arguments, status=0, **environment):
        """Run a script from elsewhere; return what it printed, on standard error where it must fail."""
        answer = subprocess.run(
            [self.root / "sbatch" / script, *arguments],
            cwd=self.folder / "elsewhere",
            env=self.environment(**environment),
            capture_output=True,
            text=True,
        )
        assert answer.returncode == status, answer
        return answer.stderr if status else answer.stdout

    def run_job(self, script, *arguments, **environment):
        """Run a script as Slurm does: a copy of it, from the repository's root."""
        copy = shutil.copy(self.root / "sbatch" / script, self.folder / "slurm_script")
        environment = self.environment(SLURM_JOB_ID="5", **environment)
        return subprocess.Popen([copy, *arguments], cwd=self.root, env=environment, stdout=subprocess.PIPE, text=True)

    def calls(self, program):
        """Return the arguments of each call of a program."""
        file = self.folder / f"{program}.calls"
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []

    def write_status(self, done=(), settings=None):
        """Let evaluate.py say what it says of these settings (the grid) when rows of these names are there."""
        cells = [cell(**one) for one in settings] if settings else make_cells(_grid())
        for one in cells:
            if {one.name, *one.grid_names} & set(done):
                write_row(self.folder / "rows", fake_row(one))
        lines = status_lines(cells, self.folder / "rows", "c0ffee")
        (self.folder / "python.status").write_text("\n".join(lines) + "\n")


def _grid():
    return [{**cell().settings, "reuse_mode": "output", **point} for point in points(GRID)]


@pytest.fixture
def machine(checkout, tmp_path):
    return Machine(checkout, tmp_path)


def submitted(machine):
    """Return the array, the script and its arguments of the one submission."""
    (call,) = machine.calls("sbatch")
    place = next(number for number, word in enumerate(call) if word.endswith(".sh"))
    (array,) = [word.removeprefix("--array=") for word in call if word.startswith("--array=")]
    assert any(word.startswith(f"--output={machine.root}/logs/%x-") for word in call)
    return array, call[place].removeprefix(f"{machine.root}/sbatch/"), call[place + 1 :]


def test_a_grid_is_submitted_as_one_task_for_each_of_its_seven_cells(machine):
    printed = machine.call(REUSE, "--checkpoint", "data/tiny", "--limit=4", "--", "--threshold", "0.8")
    assert f"submitted job 12, an array of 7: {GRID_CELLS}; logs: logs/*-12_*.out" in printed
    given = ["--checkpoint", "data/tiny", "--limit", "4", "--", "--threshold", "0.8"]
    assert submitted(machine) == ("0-6", REUSE, ["--cells", GRID_CELLS.replace(" ", ","), *given])
    (look,) = machine.calls("python")
    assert look == ["evaluate.py", *given[:4], "--grid", "--status", *given[5:]]


def test_what_has_a_row_is_submitted_only_where_it_is_forced(machine):
    machine.write_status(done=["k1_first", "k2_first", "k2_middle", "k2_last", "k3_first"])
    assert "array of 2: k3_middle k3_last\n" in machine.call(REUSE, "--dry-run")
    assert "array of 3: k2_middle k3_middle k3_last\n" in machine.call(REUSE, "--dry-run", "--force", "k2_middle")
    assert "array of 1: k1\n" in machine.call(REUSE, "--dry-run", "--cells", "k1_last", "--force", "k1_middle")
    assert f"array of 7: {GRID_CELLS}\n" in machine.call(REUSE, "--dry-run", "--force")
    assert "nothing to submit" in machine.call(REUSE, "--cells", "k1,k2_first")
    assert not machine.calls("sbatch")


def test_a_dry_run_prints_the_command_and_status_alone_the_rows(machine):
    printed = machine.call(REUSE, "--dry-run", "--cells", "k2_middle,k2_last", "--", "--run", "my runs/a")
    command = printed.splitlines()[-1]
    assert "run_reuse_experiments.sh --cells k2_middle,k2_last -- --run" in command
    assert shlex.split(command)[-1] == "my runs/a"
    assert machine.call(REUSE, "--status", CLUSTER="") == (machine.folder / "python.status").read_text()
    assert not machine.calls("sbatch")


def test_the_newest_export_is_named_when_the_job_is_submitted(machine):
    status = machine.folder / "python.status"
    status.write_text("checkpoint: runs/a/export (the newest export under runs/), task toy\n" + status.read_text())
    machine.call(REUSE, "--cells", "k3_last")
    assert submitted(machine)[2] == ["--cells", "k3_last", "--checkpoint", "runs/a/export"]


def test_a_task_of_an_array_measures_the_cell_of_its_number(machine):
    place = {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1"}
    arguments = ("--cells", "k1,k2_middle", "--force", "k2_middle", "--limit", "4", "--", "--seed", "1")
    with machine.run_job(REUSE, *arguments, **place) as job:
        assert "job 4_1, restart 0" in job.stdout.read()
    with machine.run_job(REUSE, *arguments, **{**place, "SLURM_ARRAY_TASK_ID": "0"}) as job:
        assert job.wait() == 0
    forced, plain = machine.calls("python")
    cell_options = ["--reuse_k", "2", "--subset", "middle", "--force", "all"]
    assert forced == ["evaluate.py", "--limit", "4", *cell_options, "--seed", "1"]
    assert plain == ["evaluate.py", "--limit", "4", "--reuse_k", "1", "--seed", "1"]


@pytest.mark.parametrize(("restarts", "requeued"), [("0", [["requeue", "4_1"]]), ("20", [])])
def test_a_job_at_its_time_limit_requeues_itself_alone_and_not_for_ever(machine, restarts, requeued):
    machine.let("python.then", "touch $0.started; sleep 0.5; exit 3\n")
    place = {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": restarts}
    with machine.run_job(SINGLE, "2", "first", **place) as job:
        end = time.monotonic() + 20
        while not (machine.folder / "python.then.started").exists() and time.monotonic() < end:
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        assert "the time is nearly over" in job.stdout.read()
    assert job.returncode == 3, "the program's own status, not the signal's"
    assert machine.calls("scontrol") == requeued


def test_one_cell_is_submitted_or_measured(machine):
    machine.write_status(settings=[{"reuse_k": 2, "subset": "middle", "reuse_mode": "output"}])
    assert "submitted job 12, an array of 1: k2_middle;" in machine.call(SINGLE, "2", "middle", "toy", "--force")
    assert submitted(machine) == ("0-0", SINGLE, ["2", "middle", "--force", "--task", "toy"])
    machine.write_status(done=["k2_middle"], settings=[{"reuse_k": 2, "subset": "middle", "reuse_mode": "output"}])
    assert "nothing to submit" in machine.call(SINGLE, "2", "middle")
    with machine.run_job(SINGLE, "1", "last", "toy") as job:
        assert job.wait() == 0
    assert machine.calls("python")[-1] == ["evaluate.py", "--task", "toy", "--reuse_k", "1"]


def test_a_baseline_is_submitted_as_one_task_for_each_of_those_of_lm_eval(machine):
    pairs = [{"task": task, "mode": mode} for mode in ("diffusion", "ar") for task in ("gsm8k", "ifeval", "mmlu")]
    machine.write_status(settings=pairs, done=["tiny-gsm8k-k1", "tiny-gsm8k-ar", "tiny-mmlu-k1"])
    models = ("--checkpoint", "a/export", "--source", "b/c")
    machine.call(PACE, *models, "--task", "gsm8k,ifeval,mmlu", CLUSTER="")
    assert submitted(machine) == ("0-1", PACE, [*models, "--task", "ifeval,mmlu"])
    look = ["--axes.checkpoint", "[a/export,b/c]", "--axes.task", "[gsm8k,ifeval,mmlu]", "--status"]
    assert machine.calls("python") == [["evaluate.py", "--device", "cuda", "--dtype", "bfloat16", *look]]
    with machine.run_job(PACE, *models, "--task", "ifeval,mmlu", "--force", SLURM_ARRAY_TASK_ID="1") as job:
        assert job.wait() == 0
    assert machine.calls("python")[-1] == ["evaluate.py", *look[:3], "[mmlu]", "--force", "all"]
    forced = machine.call(PACE, *models, "--task", "gsm8k,ifeval", "--force", "--dry-run")
    assert "array of 2: gsm8k ifeval\n" in forced and "--task gsm8k,ifeval --force" in forced


@pytest.mark.slow
def test_a_baseline_is_measured_here_by_diffusion_and_token_by_token(machine):
    arguments = ("--checkpoint", "data/tiny-adapted", "--source", "data/tiny", "--task", "tiny_problems", "--limit=1")
    usual = {"PATH": os.environ["PATH"], "FASTDLLM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CLUSTER": ""}
    printed = machine.call(HERE, *arguments, "--", "--run", f"{machine.folder}/run", **usual)
    assert printed.count("1 of 1 measurements to run") == 2
    cells = [
        path.stem.replace("-device=cpu-dtype=float32", "") for path in (machine.folder / "run" / "rows").glob("*.json")
    ]
    assert sorted(cells) == ["tiny-adapted-tiny_problems-k1-limit=1", "tiny-tiny_problems-ar-limit=1"]


def test_the_studys_runner_submits_with_slurm_and_measures_here_without(machine):
    printed = machine.call(RUNNER, "--limit", "5", "--dry-run", "--", "--offline", "data")
    assert f"would submit an array of 7: {GRID_CELLS}\n" in printed
    machine.call(RUNNER, "--force", "k2_first", "--", "--offline", "data", PATH=f"{machine.folder}/tools")
    asked = ["--checkpoint", "runs/own/export", "--task", "gsm8k"]
    last = ["--max_new_tokens", "512", "--batch_size", "256", "--offline", "data"]
    look, run = machine.calls("python")
    assert look == ["evaluate.py", *asked, "--limit", "5", "--grid", "--status", *last]
    assert run == ["evaluate.py", *asked, "--grid", "--force", "k2_first", *last]


@pytest.mark.parametrize("script", [REUSE, SINGLE, PACE, HERE, RUNNER])
def test_help_is_the_usage_and_nothing_runs(machine, script):
    for flag in ("-h", "--help"):
        usage = machine.call(script, flag)
        assert script.removeprefix("../") in usage and "--status" in usage and "SBATCH --" not in usage
    assert not machine.calls("python") and not machine.calls("sbatch")


@pytest.mark.parametrize(
    ("call", "environment", "message"),
    [
        ((REUSE, "--statsu"), {}, "unknown option --statsu; nearest: --status or"),
        ((REUSE, "--cell", "k1"), {}, "unknown option --cell; nearest: --cells or"),
        ((RUNNER, "--dry_run"), {}, "unknown option --dry_run; nearest: --dry-run or"),
        ((PACE, "--cells", "k1"), {}, "unknown option --cells; nearest: "),
        ((REUSE, "--limit"), {}, "--limit needs a value"),
        ((REUSE, "--limit", "--status"), {}, "--limit needs a value"),
        ((REUSE, "k2_first"), {}, "k2_first: not an option; cells are given as --cells"),
        ((REUSE, "--cells", "k4_first"), {}, "there is no cell k4_first; there are k1 k2_first k2_middle"),
        ((REUSE, "--force", "k1,first"), {}, "there is no cell first; there are"),
        ((REUSE,), {"CLUSTER": "pcae"}, "there is no sbatch/clusters/pcae.env; there are sbatch/clusters/local.env"),
        ((REUSE,), {"CLUSTER": ""}, "name a file of sbatch/clusters, such as CLUSTER=pace"),
        ((PACE, "--source", "a"), {"SLURM_JOB_ID": "1", "CLUSTER": "here"}, "there is no sbatch/clusters/here.env"),
        ((REUSE,), {"SLURM_JOB_ID": "1", "CLUSTER": ""}, "name a file of sbatch/clusters, such as CLUSTER=pace"),
        ((REUSE,), {"FASTDLLM_PYTHON": "no/python"}, "no/python: no such Python; `make .venv/installed` makes one"),
        (
            (REUSE, "--cells", "k1"),
            {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"},
            "task 1 of this array has no name in k1",
        ),
        ((REUSE,), {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}, "an array needs --cells"),
        ((SINGLE, "2"), {}, "give REUSE_K SUBSET [TASK], such as 2 middle gsm8k; got: 2"),
        ((SINGLE, "1", "gsm8k"), {}, "SUBSET must be first, middle, last or layers such as 3,4,5; got gsm8k"),
        ((SINGLE, "2", "first", "a", "--task", "b"), {}, "the task is given twice: a and --task b"),
        ((PACE,), {}, "name the adapted checkpoint with --checkpoint, the model it was made from with --source"),
        ((PACE, "--source", "a"), {}, "--source a is adapted: give it as --checkpoint"),
        ((HERE, "--source", "a", "--force", "k1"), {}, "k1: not an option"),
        ((HERE, "gsm8k"), {}, "gsm8k: not an option; tasks are given as --task gsm8k,ifeval"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(machine, call, environment, message):
    assert message in machine.call(*call, status=2, **environment)
    assert not machine.calls("sbatch")


def test_what_evaluate_refuses_is_not_submitted(machine):
    machine.let("python", 'echo "error: runs/no/export does not exist" >&2; exit 2\n')
    assert "runs/no/export does not exist" in machine.call(REUSE, "--checkpoint", "runs/no/export", status=2)
    machine.let("python", "")
    assert "there is no sbatch" in machine.call(REUSE, status=2, PATH=f"{machine.folder}/tools")
    assert not machine.calls("sbatch")


@pytest.mark.parametrize("extras", [(), ("eval",)])
def test_a_venv_on_a_node_gets_what_training_needs_and_what_evaluating_needs_if_told(machine, extras):
    venv = machine.folder / "venv"
    machine.let("venv.python", f'[ "$1" = -m ] || exec {sys.executable} "$@"\n')  # instead of pip
    machine.let("python", 'mkdir -p "$3/bin"; mv "$0.venv" "$3/bin/python"\n')
    (machine.folder / "venv.python").rename(machine.folder / "python.venv")
    command = [machine.root / "sbatch" / "setup_tmpdir_venv.sh", venv, *extras]
    environment = machine.environment(BASE_PYTHON=f"{machine.folder}/python")
    subprocess.run(command, cwd=machine.root, env=environment, check=True)
    lines = (venv / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>") for line in lines)
    assert any(line.startswith("lm-eval[") for line in lines) == bool(extras)
    assert (venv / "installed").exists()


def test_scripts_are_clean():
    scripts = [*ROOT.glob("sbatch/*.*"), *ROOT.glob("sbatch/clusters/*.env"), *ROOT.glob("experiments/*/sbatch/*.sh")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", *scripts], check=True, cwd=ROOT)
