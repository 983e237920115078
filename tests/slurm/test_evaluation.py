"""The reuse grid on a real Slurm, a task of an array a cell: each measured once, one requeued, one forced."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from evaluation.rows import fake_row
from training.conftest import ROOT

from fastdllm.evaluation.config import EvaluateConfig
from fastdllm.evaluation.results import write_row
from fastdllm.evaluation.settings import make_plans

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

RUN, CHECKPOINT = "runs/grid", "data/tiny-adapted"
OPTIONS = ("--checkpoint", CHECKPOINT, "--limit", "3")
PASSED = ("--", "--run", RUN, "--batch_size", "1", "--max_new_tokens", "32")
HANGING = f"""#!{sys.executable}
# Python, but where the file `hang` is, the first start of an array's task 0 stops before a third sample is kept.
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from fastdllm.evaluation.store import SampleStore
add = SampleStore.add
def add_two(store, *sample, **times):
    if len(store.samples) == 2:
        os.rename("hang", "hangs")
        time.sleep(600)
    add(store, *sample, **times)
if os.path.exists("hang") and os.environ.get("SLURM_ARRAY_TASK_ID") == "0":
    SampleStore.add = add_two
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Grid:
    """Owns a run folder in a checkout, and calls the script on it from elsewhere."""

    def __init__(self, root):
        self.root, self.rows, self.samples = root, root / RUN / "rows", root / RUN / "samples"
        (root / "python").write_text(HANGING)
        (root / "python").chmod(0o755)

    def call(self, *arguments):
        command = [self.root / "sbatch" / "run_reuse_experiments.sh", *OPTIONS, *arguments, *PASSED]
        changes = {"CLUSTER": "local", "FASTDLLM_PYTHON": f"{self.root}/python", "OMP_NUM_THREADS": "1"}
        answer = subprocess.run(command, env=os.environ | changes, cwd="/", check=True, capture_output=True, text=True)
        return answer.stdout

    def written_by(self, job):
        """Return the names of the rows that the tasks of a job say that they wrote."""
        text = "".join(log.read_text() for log in (self.root / "logs").glob(f"fastdllm-reuse-{job}_*.out"))
        return sorted(re.findall(r"^wrote .*/(.*)$", text, re.MULTILINE))

    def pretend(self, names):
        """Write rows of the grid's cells of these names, without measuring."""
        config = EvaluateConfig(
            checkpoint=CHECKPOINT, run=RUN, grid=True, limit=3, batch_size=1, max_new_tokens=32, device="cpu"
        )
        (plan,) = make_plans(config)
        for cell in plan.cells:
            if set(names) & set(cell.grid_names):
                write_row(self.rows, fake_row(cell, plan.checkpoint.digest))

    def requeue(self, job):
        """Warn a task of its time limit, as Slurm does, and return when it has answered."""
        log = self.root / "logs" / f"fastdllm-reuse-{job}.out"
        scancel = subprocess.Popen(["scancel", "--batch", "--signal=USR1", job])
        wait_until(lambda: "requeueing" in log.read_text())
        scancel.kill()  # it would signal the restarted job too, as the first one could not be asked any more
        scancel.wait()

    def times(self):
        return {path.name: path.stat().st_mtime_ns for path in self.rows.glob("*.json")}


@pytest.fixture
def grid(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    return Grid(checkout)


def wait_until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} seconds"
        time.sleep(0.1)


def num_waiting(job):
    """Return how many tasks of a job are running or waiting."""
    answer = subprocess.run(["squeue", "--array", "--noheader", f"--jobs={job}"], capture_output=True, text=True)
    return len(answer.stdout.splitlines())


def submitted_job(printed):
    return re.search(r"submitted job (\d+)", printed)[1]


def test_missing_and_forced_cells_are_measured_once_and_a_requeued_one_goes_on(grid):
    grid.pretend(["k2_first", "k2_middle", "k2_last", "k3_first", "k3_middle", "k3_last"])
    before = grid.times()
    (grid.root / "hang").touch()
    printed = grid.call("--force", "k2_middle")
    assert "6 of 7 measurements done in runs/grid/rows" in printed
    assert "an array of 2: k1 k2_middle" in printed
    job = submitted_job(printed)

    wait_until((grid.root / "hangs").exists)
    states = dict(line.split()[:2] for line in grid.call("--status").splitlines())
    assert (states["k1_first"], states["k2_first"]) == ("missing", "done")
    (partial,) = grid.samples.glob("*-k1-*.partial.jsonl")
    header, *kept = [json.loads(line) for line in partial.read_text().splitlines()]
    marked = [{**line, "sample": {**line["sample"], "text": "kept"}} for line in kept]
    partial.write_text("".join(json.dumps(line) + "\n" for line in (header, *marked)))
    grid.requeue(f"{job}_0")
    wait_until(lambda: num_waiting(job) == 0)
    after = grid.times()
    changed = sorted(name for name in after if before.get(name) != after[name])
    assert len(after) == 7 and len(changed) == 2 and changed == grid.written_by(job)
    log = (grid.root / "logs" / f"fastdllm-reuse-{job}_0.out").read_text()
    assert f"requeueing job {job}_0," in log and f"job {job}_0, restart 1" in log
    (samples,) = grid.samples.glob("*-k1-*.samples.jsonl")
    responses = [json.loads(line)["response"] for line in samples.read_text().splitlines()]
    assert len(kept) == 2 and len(responses) == 3 and responses.count("kept") == 2


@pytest.mark.by_hand
def test_a_whole_grid_is_measured_once_and_then_one_cell_again(grid):
    job = submitted_job(grid.call("--limit", "2"))
    wait_until(lambda: num_waiting(job) == 0)
    rows = grid.times()
    assert len(rows) == 7 and grid.written_by(job) == sorted(rows)
    assert "7 of 7 measurements done" in grid.call("--limit", "2", "--status")
    printed = grid.call("--limit", "2", "--force", "k2_middle")
    wait_until(lambda: num_waiting(submitted_job(printed)) == 0)
    after = grid.times()
    changed = [name for name in after if rows[name] != after[name]]
    assert len(changed) == 1 and "-k2_middle-" in changed[0] and grid.written_by(submitted_job(printed)) == changed
