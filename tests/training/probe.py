"""train.py, but it says what each process trains on, and some optimizer steps of one process are not finite.

python tests/training/probe.py '{"kind": "nan", "steps": [3], "rank": 1}' --config run.yaml
"""

import hashlib
import json
import sys

import torch
from lightning.pytorch import Callback

import fastdllm.training.run as training
from fastdllm.cli import run
from fastdllm.training.module import AdaptModule

NOISE = ("tokens", "noise_level", "is_masked_first")


class Probe(Callback):
    """Prints a digest of each sample; spoils the loss ("nan", "inf") or a gradient ("gradient") of one process."""

    def __init__(self, plan):
        self.plan = plan

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for row, index in enumerate(batch["index"].tolist()):
            digest = hashlib.sha256(b"".join(batch[name][row].numpy().tobytes() for name in NOISE)).hexdigest()
            sys.stdout.write(f"step {trainer.global_step + 1} sample {index} {digest[:16]}\n")
        sys.stdout.flush()
        is_hit = trainer.global_step + 1 in self.plan["steps"] and trainer.global_rank == self.plan["rank"]
        module.spoilt = self.plan["kind"] if is_hit else ""


class SpoiltModule(AdaptModule):
    def _score(self, batch):
        scores, objective = super()._score(batch)
        if self.training and self.spoilt == "gradient":
            objective = objective + (objective * torch.tensor(0.0)).sqrt()  # finite, its derivative is not
        elif self.training and self.spoilt:
            objective = objective + float(self.spoilt)
        return scores, objective


def main(plan, argv):
    callbacks = training.make_callbacks
    training.make_callbacks = lambda *arguments: [Probe(plan), *callbacks(*arguments)]
    training.AdaptModule = SpoiltModule
    run(training.TrainConfig, training.train, argv)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
