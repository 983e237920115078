"""Jobs of sbatch/train.sbatch on a real Slurm: requeued or cancelled, they end as a run that nothing befell."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.conftest import ROOT
from training.forked_training import ForkedTraining

from fastdllm.cli import to_yaml
from fastdllm.training.config import TrainConfig, run_folder

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

TWO_NODES, TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1"), ("--nodes=1", "--ntasks-per-node=2")
MAX_STEPS = 60
LAST_LOSS = rf"trained to step {MAX_STEPS}: loss (.*)"


class Job:
    """A submitted training and its log."""

    def __init__(self, config: TrainConfig, layout: tuple[str, str]):
        folder = Path(config.output_dir)
        file = folder / f"{config.name}.yaml"
        file.write_text(to_yaml(config))
        command = ["sbatch", "--parsable", *layout, f"--job-name={config.name}", f"--output={folder}/%x-%j.out"]
        answer = subprocess.run(
            [*command, "sbatch/train.sbatch", "--config", str(file)],
            cwd=ROOT,
            env={**os.environ, "CLUSTER": "local", "FASTDLLM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        self.number = answer.stdout.strip()
        self.log = folder / f"{config.name}-{self.number}.out"

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, pattern: str, seconds: float = 120.0) -> re.Match:
        """Return the first match of a whole line in the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if match := re.search(rf"^{pattern}$", self.text(), re.MULTILINE):
                return match
            time.sleep(0.05)
        raise TimeoutError(f"no line {pattern!r} in {seconds:g} seconds:\n{self.text()}")

    def signal(self, name: str, step: str = "") -> None:
        subprocess.run(["scancel", f"--signal={name}", self.number + step], check=True)

    def state(self) -> str:
        answer = subprocess.run(["scontrol", "show", "job", self.number], check=True, capture_output=True, text=True)
        return re.search(r"JobState=(\w+)", answer.stdout)[1]

    def wait_for_state(self, state: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while self.state() != state:
            assert time.monotonic() < end, f"{self.state()}, not {state}, after {seconds:g} seconds:\n{self.text()}"
            time.sleep(0.2)


@pytest.fixture
def make_long_config(make_config):
    def make(name: str) -> TrainConfig:
        config = make_config(name=name, max_steps=MAX_STEPS, checkpoint_every=100, validate_every=100)
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, loader_workers=1)
        )  # signals reach them

    return make


@pytest.fixture(scope="module")
def losses():
    """Last loss of the unbroken run, once a test has needed it."""
    return {}


def last_loss(job: Job) -> str:
    return job.wait_for(LAST_LOSS)[1]


@pytest.fixture
def unbroken_loss(losses, make_long_config):
    """Return the last loss of a run without Slurm that nothing befalls."""
    if not losses:
        config = dataclasses.replace(make_long_config("unbroken"), devices=2)
        (losses["unbroken"],) = re.findall(LAST_LOSS, "\n".join(ForkedTraining(config).finish()), re.MULTILINE)
    return losses["unbroken"]


def test_a_job_that_is_signalled_requeues_itself_and_ends_as_an_unbroken_one(unbroken_loss, make_long_config):
    config = make_long_config("requeued")
    job = Job(config, TWO_NODES)
    job.wait_for(r"step 10/.*")
    job.signal("USR1")
    step = job.wait_for(r"SIGUSR1 at step (\d+): saving and stopping")[1]
    job.wait_for(rf"requeueing job {job.number}, .*")
    assert not (run_folder(config) / "export").exists()
    job.wait_for(rf"resumed at step {step}")
    assert last_loss(job) == unbroken_loss
    job.wait_for_state("COMPLETED")
    assert (run_folder(config) / "export" / "config.json").exists()
    assert job.text().count(f"\nstep {MAX_STEPS}/{MAX_STEPS} ") == 1, "only the first process prints"
    assert job.text().count("data: train: ") == 2, "at each start one process prepares for both nodes"


def test_a_job_that_is_killed_then_cancelled_and_submitted_again_ends_as_an_unbroken_one(
    unbroken_loss, make_long_config
):
    config = dataclasses.replace(make_long_config("broken"), checkpoint_every=8)
    killed = Job(config, TWO_TASKS)
    killed.wait_for(r"step 10/.*")
    killed.signal("KILL", step=".0")
    killed.wait_for_state("FAILED")
    cancelled = Job(config, TWO_TASKS)
    assert int(cancelled.wait_for(r"resumed at step (\d+)")[1]) % 8 == 0
    cancelled.wait_for(r"step 30/.*")
    subprocess.run(["scancel", cancelled.number], check=True)
    step = cancelled.wait_for(r"SIGTERM at step (\d+): saving and stopping")[1]
    cancelled.wait_for_state("CANCELLED")
    last = Job(config, TWO_TASKS)
    last.wait_for(rf"resumed at step {step}")
    assert last_loss(last) == unbroken_loss
    last.wait_for_state("COMPLETED")
