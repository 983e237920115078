"""train.py in forked processes, one for each device of its config.

After the start they do what `python train.py` does: each reads its options from a file and finds the others through the
variables that torchrun and Lightning's own launcher set. The launcher itself, and starts from nothing, are tested with
`run_program` of conftest.py and with benchmarks/kill_training.py.
"""

import socket
import time
from pathlib import Path

import forked
from lightning.pytorch.utilities import rank_zero_only

from fastdllm.cli import run, to_yaml
from fastdllm.training.config import TrainConfig
from fastdllm.training.run import train
from training import probe

PATIENCE = 20.0  # seconds that processes are given to end after one of them has failed


def be_process(rank: int, file: Path, plan: dict | None) -> None:
    """Be process `rank` of the training whose options are in `file`, spoilt by a plan of probe.py if there is one."""
    rank_zero_only.rank = rank  # Lightning reads it when it is imported
    argv = ["--config", str(file)]
    run(TrainConfig, train, argv) if plan is None else probe.main(plan, argv)


class ForkedTraining:
    """Owns the processes of a training, and what they print."""

    def __init__(self, config: TrainConfig, plan: dict | None = None):
        file = Path(config.output_dir) / f"{config.name}.yaml"
        file.write_text(to_yaml(config))
        self.log = file.with_suffix(".out")
        self.log.write_text("")
        environment = {}
        if config.devices > 1:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
        self.processes = []
        for rank in range(config.devices):
            own = {"LOCAL_RANK": str(rank)} if config.devices > 1 else {}
            self.processes.append(forked.start(be_process, rank, file, plan, log=self.log, **environment, **own))

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def finish(self) -> list[str]:
        """Wait for the end and return what was printed; an error of any process is one here."""
        end = float("inf")
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + PATIENCE)
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            raise RuntimeError(f"training ended with {codes}:\n" + "\n".join(self.lines()[-80:]))
        return self.lines()

    def kill_after(self, step: int) -> list[str]:
        """SIGKILL all processes when an optimizer step is printed; return what was printed."""
        while not any(line.startswith(f"step {step}/") for line in self.lines()):
            assert all(process.is_alive() for process in self.processes), "\n".join(self.lines())
            time.sleep(0.005)
        self.kill()
        return self.lines()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
