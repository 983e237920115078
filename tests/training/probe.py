"""train.py, but the loss or the gradients of some optimizer steps are not finite, on one process of them.

python tests/training/poison.py --poison '{"kind": "nan", "steps": [3], "rank": 1}' --config run.yaml
"""

import json
import sys

import torch
from lightning.pytorch import Callback

import fastdllm.training.run as training
from fastdllm.cli import run
from fastdllm.training.module import AdaptModule


class Poison(Callback):
    """Spoils what the plan names: the loss ("nan", "inf") or a gradient ("gradient") of a process at some steps."""

    def __init__(self, plan):
        self.plan = plan

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
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
    callbacks = training._callbacks
    training._callbacks = lambda *arguments: [Poison(plan), *callbacks(*arguments)]
    training.AdaptModule = SpoiltModule
    run(training.TrainConfig, training.train, argv)


if __name__ == "__main__":
    main(json.loads(sys.argv[2]), sys.argv[3:])
