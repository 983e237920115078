"""Batches of packed samples whose order and noise are functions of (seed, global sample index) alone."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdllm.data.documents import Documents, prepare_documents
from fastdllm.data.packing import LongDocuments, Objective, PackedSamples, Packing, pack
from fastdllm.data.sources import SourceConfig, check_source
from fastdllm.draft import DraftConfig, draft_windows, draw_anchors
from fastdllm.objective import draw_noise

VALIDATION_SEED = 2**31 - 1  # validation noise is the same in every run, so that losses of different seeds compare
ORDERS_KEPT = 4  # epochs whose order a process remembers: a step may reach over the end of an epoch


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """What is learnt from: the source, its packing, validation and loading."""

    sample_length: int = 2048
    """Tokens of the longest document, L; a multiple of objective.block_size. A sample is three times L rows: L tokens,
    or more where dead rows are left out (objective.drop_dead_rows)."""
    long_documents: LongDocuments = "drop"
    """Documents longer than sample_length are dropped, cut at its end, or an error; they are counted."""
    validation_path: str = ""
    """Source of the validation set, read like data.path; empty to hold out documents of data.path."""
    validation_split: str = ""
    """Split of a hub dataset in validation_path; empty for data.split."""
    validation_samples: int = 0
    """Samples of the validation set. With validation_path: at most so many of it, 0 for all; without: filled with the
    last documents of data.path, which are not trained on, 0 for no validation."""
    cache_dir: str = "data/prepared"
    """Folder of the tokenised data, about 5 bytes per token."""
    num_workers: int = 4
    """Processes that tokenise, 0 or more; 0 does it in the main process."""
    prepare_per_node: bool = False
    """Tokenise on each node, where nodes do not share cache_dir; else one process does it for all, which wait."""
    loader_workers: int = 2
    """Processes that load batches, per device, 0 or more; 0 loads in the main process."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("validation_samples", "num_workers", "loader_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be 0 or more, got {getattr(self, name)}.")
        if self.sample_length < 1:
            raise ValueError(f"data.sample_length must be 1 or more, got {self.sample_length}.")
        if self.validation_split and not self.validation_path:
            raise ValueError(
                f"data.validation_split {self.validation_split!r} does nothing without data.validation_path; for "
                f"another split of the same dataset set that to data.path ({self.path!r})."
            )
        if self.validation_path and self.validation_path == self.path and self.validation_split in ("", self.split):
            raise ValueError(
                f"data.validation_path {self.validation_path!r} is what is trained on; name another file or "
                "data.validation_split, or leave it empty and hold out documents with data.validation_samples."
            )

    @property
    def validation_source(self) -> SourceConfig:
        """The source of a separate validation set; without validation_path there is none."""
        own = {"path": self.validation_path, "split": self.validation_split or self.split, "limit": 0}
        source = replace(self, **own, validation_path="", validation_split="")
        return replace(source, subset="") if source.files else source

    def check_sources(self) -> None:
        """Make sure that what is trained on and what validates can be read.

        Raises:
            FileNotFoundError, ValueError: what is missing, and what to do.
        """
        check_source(self)
        if not self.validation_path:
            return
        try:
            check_source(self.validation_source, option="data.validation_path")
        except (FileNotFoundError, ValueError) as error:  # often a demo's own set, beside data that the user named
            way_out = 'To hold out documents of data.path instead: --data.validation_path ""'
            raise type(error)(f"{error} {way_out}.") from error


@dataclass(frozen=True)
class BatchPlan:
    """Which global sample indices each micro-batch of each rank holds: optimizer step s owns s * G .. s * G + G - 1."""

    micro_batch_size: int
    accumulate: int
    world_size: int
    rank: int

    @property
    def samples_per_step(self) -> int:
        """G, the samples of an optimizer step over all ranks and micro-batches."""
        return self.micro_batch_size * self.world_size * self.accumulate

    def indices(self, step: int, micro_batch: int) -> list[int]:
        """Return this rank's global sample indices of a micro-batch."""
        first = step * self.samples_per_step + (micro_batch * self.world_size + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))


class StepSampler(Sampler[list[int]]):
    """This rank's micro-batches of the optimizer steps start_step .. max_steps - 1.

    Its length counts all micro-batches from step 0: Lightning adds those of the restored progress to what it fetches.
    """

    def __init__(self, plan: BatchPlan, start_step: int, max_steps: int):
        self.plan, self.start_step, self.max_steps = plan, start_step, max_steps
        self.batch_size = plan.micro_batch_size  # read by Lightning's DeepSpeed strategy

    def __len__(self) -> int:
        return self.max_steps * self.plan.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            for micro_batch in range(self.plan.accumulate):
                yield self.plan.indices(step, micro_batch)


class TrainingSamples(Dataset):
    """Samples by global sample index, which runs through all epochs; each epoch has its own order."""

    def __init__(self, samples: PackedSamples, seed: int, samples_per_step: int):
        self.samples, self.seed, self.samples_per_step = samples, seed, samples_per_step
        self._orders: dict[int, np.ndarray] = {}
        self._step_targets: tuple[int, float] = (-1, 0.0)  # last step asked for, its targets

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._drawn(index) | {"step_targets": torch.tensor(self.step_targets(index // self.samples_per_step))}

    def _drawn(self, index: int) -> dict[str, Tensor]:
        return _with_draws(self.samples[self.sample_number(index)], self.seed, index, self.samples)

    def sample_number(self, index: int) -> int:
        """Return which packed sample stands at a global sample index."""
        epoch, offset = divmod(index, len(self.samples))
        return int(self._order(epoch)[offset])

    def step_targets(self, step: int) -> float:
        """Return the supervised targets of an optimizer step, over all ranks and micro-batches; of windows, whose
        targets are drawn, the sum of their weights."""
        if self._step_targets[0] != step:
            indices = range(step * self.samples_per_step, (step + 1) * self.samples_per_step)
            numbers = [self.sample_number(index) for index in indices]
            total = float(self.samples.packing.num_targets[numbers].sum())
            if isinstance(self.samples.objective, DraftConfig):
                total = _window_weights(self.samples.objective, map(self._drawn, indices))
            self._step_targets = step, total
        return self._step_targets[1]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == ORDERS_KEPT:
                self._orders.pop(next(iter(self._orders)))
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._orders[epoch] = generator.permutation(len(self.samples))
        return self._orders[epoch]


class ValidationSamples(Dataset):
    """The validation samples with fixed noise; beyond the last one they repeat without anything supervised."""

    def __init__(self, samples: PackedSamples):
        self.samples = samples
        self.num_targets = float(samples.packing.num_targets.sum())
        if isinstance(samples.objective, DraftConfig):
            self.num_targets = _window_weights(samples.objective, map(self._drawn, range(len(samples))))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._drawn(index) | {"step_targets": torch.tensor(self.num_targets)}

    def _drawn(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index % len(self.samples)]
        if index >= len(self.samples):
            sample["is_response"] = np.zeros_like(sample["is_response"])
            sample["num_tokens"] = np.int64(0)
        return _with_draws(sample, VALIDATION_SEED, index, self.samples)


def _with_draws(sample: dict[str, np.ndarray], seed: int, index: int, samples: PackedSamples) -> dict[str, Tensor]:
    """Return the sample as tensors, with what its objective draws: noise, or the anchors of windows."""
    tensors = {name: torch.as_tensor(value) for name, value in sample.items()} | {"index": torch.tensor(index)}
    objective = samples.objective
    if isinstance(objective, DraftConfig):
        num_windows = objective.num_windows(samples.sample_length)
        return tensors | {"anchor": draw_anchors(seed, index, tensors["is_response"], tensors["document"], num_windows)}
    noise_level, is_masked_first = draw_noise(seed, index, len(sample["tokens"]), objective.block_size)
    return tensors | {"noise_level": noise_level, "is_masked_first": is_masked_first}


def _window_weights(draft: DraftConfig, samples: Iterable[dict[str, Tensor]]) -> float:
    """Return the sum of the weights of all windows' rows; 1 where there is none, for it is divided by."""
    batches = ({name: values[None] for name, values in sample.items()} for sample in samples)
    return float(sum(draft_windows(batch, draft).targets.weight.double().sum() for batch in batches)) or 1.0


class AdaptDataModule(LightningDataModule):
    """Prepares the data once and serves this rank's batches.

    World size, rank, accumulation and the length of the run come from the trainer, which must have
    `use_distributed_sampler=False` and a finite `max_steps`.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        *,
        mask_token_id: int,
        objective: Objective,
        seed: int,
        micro_batch_size: int,
    ):
        super().__init__()
        self.config, self.tokenizer, self.mask_token_id = config, tokenizer, mask_token_id
        self.objective, self.seed, self.micro_batch_size = objective, seed, micro_batch_size
        self.prepare_data_per_node = config.prepare_per_node  # read by Lightning
        self._folders: list[Path] = []  # of the prepared sources
        self.training: PackedSamples | None = None
        self.validation: PackedSamples | None = None

    def prepare_data(self) -> None:
        """Tokenise and pack; one process of the job, or of each node, does it, and the others then find the files."""
        config = self.config
        config.check_sources()
        sources = [config, config.validation_source] if config.validation_path else [config]
        self._folders = [
            prepare_documents(source, self.tokenizer, config.cache_dir, config.num_workers) for source in sources
        ]
        self._open()

    def setup(self, stage: str) -> None:
        """Open the prepared data; raise a FileNotFoundError on a node that does not have it."""
        if self.trainer is not None:
            self._folders = self.trainer.strategy.broadcast(self._folders)
        missing = [folder for folder in self._folders if not folder.is_dir()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}, which the first process prepared, is not there for this one: let all nodes share "
                "data.cache_dir, or set --data.prepare_per_node."
            )
        self._open()
        if self.trainer is not None and self.trainer.is_global_zero and stage == "fit":
            print(self.describe())

    def _open(self) -> None:
        config = self.config
        held_out = 0 if config.validation_path else config.validation_samples
        self.training, self.validation = self._packed(self._folders[0], held_out)
        if config.validation_path:
            self.validation, _ = self._packed(self._folders[1], 0)
            if config.validation_samples:
                self.validation.packing = self.validation.packing.first(config.validation_samples)

    def _packed(self, folder: Path, held_out_samples: int) -> tuple[PackedSamples, PackedSamples]:
        documents, config = Documents(folder), self.config
        shape = {
            "objective": self.objective,
            "sample_length": config.sample_length,
            "mask_token_id": self.mask_token_id,
        }
        parts = pack(documents, **shape, long_documents=config.long_documents, held_out_samples=held_out_samples)
        return tuple(PackedSamples(documents, part, **shape) for part in parts)

    @property
    def tokens_per_epoch(self) -> int:
        """Document tokens of the training samples, padding not counted."""
        return int(self.training.packing.num_tokens.sum())

    @property
    def plan(self) -> BatchPlan:
        """Who reads what, from the trainer."""
        trainer = self.trainer
        return BatchPlan(
            self.micro_batch_size, trainer.accumulate_grad_batches, trainer.world_size, trainer.global_rank
        )

    def describe(self) -> str:
        """Return what is trained on, and how many epochs that makes."""
        packing, shape = self.training.packing, self.training.shape
        num_samples = self.trainer.max_steps * self.plan.samples_per_step
        epochs = num_samples / len(packing)
        return (
            f"data: {len(packing):,} samples of {shape.num_rows} rows, {packing.fill:.1%} of them needed, "
            f"{self.tokens_per_epoch / len(packing):,.0f} document tokens each ({self.tokens_per_epoch:,} in all, "
            f"{int(packing.num_targets.sum()):,} of them supervised); {self._left_out(packing)}\n"
            f"data: {self._describe_validation()}\n"
            f"data: the run asks for {round(epochs * self.tokens_per_epoch):,} tokens in {num_samples:,} samples: "
            f"{epochs:.2f} epochs"
        )

    def _describe_validation(self) -> str:
        packing, is_held_out = self.validation.packing, not self.config.validation_path
        text = f"{len(packing):,} validation samples, {packing.num_surplus:,} documents beyond them not used"
        return text if is_held_out else f"{text}; {self._left_out(packing)}"

    def _left_out(self, packing: Packing) -> str:
        return (
            f"{packing.num_long:,} documents too long ({self.config.long_documents}), "
            f"{packing.num_without_targets:,} without a response, {packing.num_with_mask_token:,} with the mask token"
        )

    def train_dataloader(self) -> DataLoader:
        """Return this rank's micro-batches from the restored optimizer step on."""
        plan, max_steps = self.plan, self.trainer.max_steps
        if max_steps < 0:
            raise ValueError("the trainer's max_steps must be a number of optimizer steps, got -1 (endless).")
        samples = TrainingSamples(self.training, self.seed, plan.samples_per_step)
        return self._loader(samples, StepSampler(plan, self.trainer.global_step, max_steps))

    def val_dataloader(self) -> DataLoader | list:
        """Return this rank's share of the validation set; all ranks get equally many batches."""
        if not len(self.validation):
            return []
        plan = replace(self.plan, accumulate=1)
        num_batches = -(-len(self.validation) // plan.samples_per_step)
        return self._loader(ValidationSamples(self.validation), StepSampler(plan, 0, num_batches))

    def _loader(self, samples: Dataset, sampler: StepSampler) -> DataLoader:
        return _PositionlessLoader(
            samples,
            batch_sampler=sampler,
            num_workers=self.config.loader_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.config.loader_workers > 0,
            worker_init_fn=_outlive_sigterm,
        )


def _outlive_sigterm(worker: int) -> None:
    """Ignore the signal that a cluster sends to all processes of a job: the main one takes a last step and saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _PositionlessLoader(DataLoader):
    """A loader that tells Lightning it can be resumed: its sampler already starts at the restored step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
