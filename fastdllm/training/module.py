"""The LightningModule: batch -> rows -> loss -> sums for the log; optimizer and learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from fastdllm.masks import (
    BlockMaskBuilder,
    ContextAttention,
    Rows,
    count_attention_pairs,
    dense_attention_mask,
    training_attention,
)
from fastdllm.model import BlockDiffusionLM, forward_flops
from fastdllm.objective import (
    ObjectiveConfig,
    Targets,
    autoregressive_inputs,
    block_diffusion_inputs,
    token_losses,
    weighted_sum,
)
from fastdllm.training.strategies import clip_gradients, shard

NUM_NOISE_BINS = 10
NEXT_TOKEN_BIN = NUM_NOISE_BINS  # targets of the autoregressive loss have no noise level
BACKWARD_AND_FORWARD = 3  # the backward pass costs two forward passes: gradients of the inputs and of the weights
FROZEN_BACKWARD_AND_FORWARD = 2  # no gradients of the weights; what low-rank updates and attention add is not counted


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate over the run."""

    learning_rate: float = 2e-5
    """Peak learning rate, above 0."""
    weight_decay: float = 0.0
    """Decay of the layers' weight matrices, 0 or more; norms, biases and embeddings have none."""
    beta1: float = 0.9
    """Decay of the gradient's running mean, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the gradient's running square, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of the running square, above 0."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises in a straight line to its peak, 0 or more."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a half cosine down to min_ratio of the peak at max_steps, or the peak."""
    min_ratio: float = 0.1
    """Last learning rate of the cosine as a share of the peak, in [0, 1]."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns it off."""

    def __post_init__(self):
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {getattr(self, name)}.")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optimizer.min_ratio must be in [0, 1], got {self.min_ratio}.")


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_ratio + (1 - config.min_ratio) * cosine


class Scores(NamedTuple):
    """What a training pass gives: M scored predictions and what they cost."""

    loss: Tensor
    """[M] float32, in nats."""
    is_correct: Tensor
    """[M] bool."""
    targets: Targets
    num_rows: int
    """Rows through the layers."""
    num_pairs: Tensor
    """(query, key) pairs that the attention mask allows, one layer and head."""


class TrainingPass(nn.Module):
    """One forward pass of the objective; a module of its own because sharding gathers weights around `forward`."""

    def __init__(self, model: BlockDiffusionLM, objective: ObjectiveConfig):
        super().__init__()
        self.model, self.objective = model, objective
        self._builder: BlockMaskBuilder | None = None

    def forward(self, batch: dict[str, Tensor]) -> Scores:
        """Return the scores of a collated batch."""
        model, objective = self.model, self.objective
        if objective.kind == "autoregressive":
            (tokens, rows, targets), context = autoregressive_inputs(batch), "causal"
        else:
            tokens, rows, targets = block_diffusion_inputs(batch, objective, model.mask_token_id)
            context = objective.context_attention
        attention_mask = self._attention_mask(rows, context)
        hidden = model.hidden_states(tokens, rows.position, attention_mask)  # [B, R, C]
        loss, is_correct = token_losses(hidden.flatten(0, 1)[targets.row], model.qwen.lm_head.weight, targets.token)
        num_pairs = count_attention_pairs(rows, objective.block_size, context)
        return Scores(loss, is_correct, targets, tokens.numel(), num_pairs)

    def _attention_mask(self, rows: Rows, context: ContextAttention) -> Tensor | BlockMask:
        if not rows.position.is_cuda:  # FlexAttention has no backward pass on the CPU
            predicate = training_attention(rows, self.objective.block_size, context)
            return dense_attention_mask(predicate, *rows.position.shape, rows.position.device)
        if self._builder is None or not self._builder.fits(rows):
            self._builder = BlockMaskBuilder(rows, self.objective.block_size, context)
        return self._builder.build(rows)


class Meter:
    """Sums of loss, correct predictions and targets by noise level over some batches, on the device in float64."""

    def __init__(self, device: torch.device):
        self.bins = torch.zeros(NUM_NOISE_BINS + 1, 3, dtype=torch.float64, device=device)  # loss, correct, targets
        self.objective = torch.zeros(1, dtype=torch.float64, device=device)
        self.num_tokens = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, scores: Scores, objective: Tensor, num_tokens: Tensor) -> None:
        """Count a micro-batch; `objective` [] is its part of the step's loss, before any scaling for averages."""
        level = scores.targets.noise_level.float()
        index = (level.nan_to_num(0.0) * NUM_NOISE_BINS).long().clamp(max=NUM_NOISE_BINS - 1)
        index = torch.where(level.isnan(), NEXT_TOKEN_BIN, index)
        member = nn.functional.one_hot(index, NUM_NOISE_BINS + 1).double()  # [M, bins]; a product has a fixed order
        values = torch.stack([scores.loss.detach(), scores.is_correct, torch.ones_like(scores.loss)], dim=1).double()
        self.bins += member.T @ values
        self.objective += objective.detach()
        self.num_tokens += num_tokens.sum()

    def read(self, num_steps: int = 1) -> dict[str, float]:
        """Return means over `num_steps` steps and all processes, which must all call this; empty bins are left out."""
        sums = torch.cat([self.bins.flatten(), self.objective, self.num_tokens])
        *flat, objective, num_tokens = add_over_processes(sums).tolist()
        bins = [flat[start : start + 3] for start in range(0, len(flat), 3)]
        noised = [sum(column) for column in zip(*bins[:NUM_NOISE_BINS], strict=True)]
        values = {"loss": objective / num_steps}
        if noised[2]:
            values |= {"masked_accuracy": noised[1] / noised[2], "masked_fraction": noised[2] / (2 * num_tokens)}
        if bins[NEXT_TOKEN_BIN][2]:
            loss, correct, count = bins[NEXT_TOKEN_BIN]
            values |= {"next_token_loss": loss / count, "next_token_accuracy": correct / count}
        for number, (loss, correct, count) in enumerate(bins[:NUM_NOISE_BINS]):
            if count:
                name = f"{number / NUM_NOISE_BINS:.1f}-{(number + 1) / NUM_NOISE_BINS:.1f}"
                values |= {f"loss_by_noise/{name}": loss / count, f"accuracy_by_noise/{name}": correct / count}
        return values


def add_over_processes(values: Tensor) -> Tensor:
    """Return the element-wise sum over all processes; with one process, `values`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


class AdaptModule(LightningModule):
    """Owns the model in training; promises a gradient that does not depend on how a step is split into micro-batches.

    The loss of an optimizer step is the sum over all its targets, divided by their number over all processes and
    micro-batches; processes and micro-batches are averaged later, so each part is scaled up by their number.
    """

    def __init__(
        self,
        model: BlockDiffusionLM,
        *,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        max_steps: int,
        log_every: int,
        compute_dtype: torch.dtype = torch.float32,
        compile_layers: bool = False,
        data_tokens: int = 0,
    ):
        super().__init__()
        self.scoring = TrainingPass(model.train(), objective)
        self.optimizer_config, self.max_steps, self.log_every = optimizer, max_steps, log_every
        self.compute_dtype, self.compile_layers = compute_dtype, compile_layers
        self.earlier_data_tokens = data_tokens  # of all processes, before this start
        self.meter: Meter | None = None  # since the last report, which replaces it
        self.step_loss: Tensor | None = None  # of this process, this optimizer step
        self.validation_meter: Meter | None = None
        self.counters: Tensor | None = None  # [3] float64 since this start: document tokens, rows, operations
        self.gradient_norm: Tensor | None = None
        self.num_passes = FROZEN_BACKWARD_AND_FORWARD if self._frozen() else BACKWARD_AND_FORWARD
        self._is_configured = False

    @property
    def model(self) -> BlockDiffusionLM:
        return self.scoring.model

    def configure_model(self) -> None:
        """Compile the layers in place and, for FSDP2, shard them; Lightning may call this twice."""
        if self._is_configured:
            return
        self._is_configured = True
        layers = self.model.qwen.model.layers
        if self.compile_layers:
            for layer in layers:
                layer.compile(dynamic=False)
        if self.device_mesh is not None:
            shard(self.scoring, layers, self.device_mesh, self.compute_dtype)

    def configure_optimizers(self) -> dict:
        """Return AdamW (fused on CUDA, unless fp16's loss scaling must see the gradients first) and its schedule."""
        config = self.optimizer_config
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if _decays(name, p)]
        others = [p for name, p in trained if not _decays(name, p)]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=self.trainer.strategy.root_device.type == "cuda" and self.compute_dtype != torch.float16,
        )
        max_steps = self.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, max_steps, config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the global norm and keep it for the log.

        Lightning's own form refuses a fused optimizer also where it would be right (bf16). DeepSpeed clips by itself.
        """
        self.gradient_norm = clip_gradients(self, gradient_clip_val or math.inf)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave frozen weights out: the source has them."""
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Put them back, so that loading still finds every missing or unknown name."""
        own = self.state_dict()
        for name in self._frozen():
            checkpoint["state_dict"][name] = own[name]

    def _frozen(self) -> list[str]:
        return [name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad]

    def on_train_start(self) -> None:
        self.counters = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.meter = Meter(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the micro-batch's part of the loss, scaled for the mean over processes and micro-batches to come."""
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self.step_loss = torch.zeros((), device=self.device)
        scores, objective = self._score(batch)
        self.step_loss += objective.detach()
        self.meter.add(scores, objective, batch["num_tokens"])
        config = self.model.qwen.config
        flops = self.num_passes * forward_flops(config, scores.num_rows, scores.num_pairs, scores.loss.numel())
        self.counters[0] += batch["num_tokens"].sum()
        self.counters[1] += scores.num_rows
        self.counters[2] += flops
        return objective * (self.trainer.world_size * accumulate)

    def _score(self, batch: dict[str, Tensor]) -> tuple[Scores, Tensor]:
        """Return the scores and their sum over the number of targets in the whole optimizer step, float32 []."""
        scores = self.scoring(batch)
        total = weighted_sum(scores.loss, scores.targets, self.scoring.objective.ar_loss_weight)
        return scores, total / batch["step_targets"][0]

    def is_reported(self, step: int) -> bool:
        """Return whether optimizer step `step` (from 1) goes to the log."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def on_validation_start(self) -> None:
        self.validation_meter = Meter(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores, objective = self._score(batch)
        self.validation_meter.add(scores, objective, batch["num_tokens"])

    def data_tokens(self) -> int:
        """Return the document tokens of the run so far, over all processes, which must all call this."""
        since_start = 0 if self.counters is None else int(add_over_processes(self.counters)[0])
        return self.earlier_data_tokens + since_start


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name
