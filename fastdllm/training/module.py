"""The LightningModule: batch -> rows -> loss -> sums for the log; optimizer and learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from fastdllm.draft import DraftConfig
from fastdllm.masks import (
    EMPTY,
    BlockMaskBuilder,
    ContextAttention,
    Rows,
    count_attention_pairs,
    dense_attention_mask,
    training_attention,
)
from fastdllm.model import BlockDiffusionLM, ChosenRows, PassSize, Recompute, forward_flops
from fastdllm.objective import (
    ObjectiveConfig,
    Targets,
    autoregressive_inputs,
    block_diffusion_inputs,
    drop_dead_rows,
    scored_rows,
    token_losses,
)
from fastdllm.training.compilation import Compilation
from fastdllm.training.drafting import DraftPass
from fastdllm.training.lora import frozen_checksum
from fastdllm.training.meter import Meter, Scores, add_over_processes
from fastdllm.training.strategies import clip_gradients, gather_whole_layers, keep_batches_exact, shard

COUNTERS = ("tokens", "rows", "operations", "empty_rows")
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
        if self.schedule == "constant" and self.min_ratio != OptimizerConfig.min_ratio:
            raise ValueError(
                f"optimizer.min_ratio {self.min_ratio} does nothing with optimizer.schedule constant; leave one out."
            )


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) as a share of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_ratio + (1 - config.min_ratio) * cosine


class TrainingPass(nn.Module):
    """One forward pass of the objective; a module of its own because sharding gathers weights around `forward`."""

    def __init__(self, model: BlockDiffusionLM, objective: ObjectiveConfig, sample_length: int):
        super().__init__()
        self.model, self.objective, self.shape = model, objective, objective.sample_shape(sample_length)
        is_frozen = any(not parameter.requires_grad for parameter in model.parameters())
        self.num_passes = FROZEN_BACKWARD_AND_FORWARD if is_frozen else BACKWARD_AND_FORWARD
        self._builders: dict[tuple, BlockMaskBuilder] = {}

    def forward(self, batch: dict[str, Tensor]) -> Scores:
        """Return the scores of a collated batch."""
        model, objective = self.model, self.objective
        tokens, rows, targets = self._rows(batch)
        mask = self._attention_mask(rows)
        chosen, queries = None, rows
        if self.shape.num_targets < self.shape.num_rows:
            index, targets = scored_rows(targets, self.shape.num_targets)
            queries = Rows(*(tensor.gather(1, index) for tensor in rows))
            chosen = ChosenRows(index, self._attention_mask(rows, queries))
        hidden = model.hidden_states(tokens, rows.position, mask, chosen=chosen)  # [B, T, C]
        targets = Targets(*(tensor.flatten() for tensor in targets))
        total, loss, is_correct = token_losses(
            hidden.flatten(0, 1), model.qwen.lm_head.weight, targets.token, targets.weight
        )
        seen = [count_attention_pairs(some, objective.block_size, self._context) for some in (rows, queries)]
        size = PassSize(tokens.numel(), targets.token.numel(), seen[0].sum(), seen[1].sum(), targets.token.numel())
        operations = self.num_passes * forward_flops(model.qwen.config, size)
        return Scores(total, loss, is_correct, targets, tokens.numel(), operations, (rows.document == EMPTY).sum())

    def use_training_form(self, recompute: Recompute, is_compiled: bool) -> None:
        """Run all layers in their form for training from now on."""
        self.model.use_training_form(recompute, is_compiled)

    def new_meter(self, device: torch.device, num_steps: int = 1) -> Meter:
        """Return what counts scores of this pass."""
        return Meter(device, num_steps)

    @property
    def _context(self) -> ContextAttention:
        return "causal" if self.objective.kind == "autoregressive" else self.objective.context_attention

    def _rows(self, batch: dict[str, Tensor]) -> tuple[Tensor, Rows, Targets]:
        objective = self.objective
        if objective.kind == "autoregressive":
            return autoregressive_inputs(batch)
        inputs = block_diffusion_inputs(batch, objective, self.model.mask_token_id)
        if not objective.drop_dead_rows:
            return inputs
        return drop_dead_rows(*inputs, objective.block_size, self.shape.num_rows)

    def _attention_mask(self, rows: Rows, queries: Rows | None = None) -> Tensor | BlockMask:
        (batch_size, num_rows), device = rows.position.shape, rows.position.device
        num_queries = num_rows if queries is None else queries.position.shape[1]
        if device.type != "cuda":  # FlexAttention has no backward pass on the CPU
            predicate = training_attention(rows, self.objective.block_size, self._context, queries)
            return dense_attention_mask(predicate, batch_size, num_rows, device, num_queries)
        shape = (batch_size, num_queries, num_rows)
        if shape not in self._builders:
            self._builders[shape] = BlockMaskBuilder(*shape, self.objective.block_size, self._context, device)
        return self._builders[shape].build(rows, queries)


class AdaptModule(LightningModule):
    """Owns the model in training; promises a gradient that does not depend on how a step is split into micro-batches.

    The loss of an optimizer step is the sum over all its targets, divided by their number over all processes and
    micro-batches; processes and micro-batches are averaged later, so each part is scaled up by their number.
    """

    def __init__(
        self,
        model: BlockDiffusionLM,
        *,
        objective: ObjectiveConfig | DraftConfig,
        optimizer: OptimizerConfig,
        max_steps: int,
        log_every: int,
        sample_length: int,
        compute_dtype: torch.dtype = torch.float32,
        compile_layers: bool = False,
        recompute: Recompute = "none",
    ):
        super().__init__()
        if isinstance(objective, DraftConfig):
            self.scoring = DraftPass(model.train(), objective)
        else:
            self.scoring = TrainingPass(model.train(), objective, sample_length)
        self.recompute = recompute
        self.optimizer_config, self.max_steps, self.log_every = optimizer, max_steps, log_every
        self.compute_dtype, self.compile_layers = compute_dtype, compile_layers
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())  # before any sharding
        self.num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.frozen_checksum = frozen_checksum(model)
        self.earlier_data_tokens = 0  # of all processes, before this start
        self.meter: Meter | None = None  # of the steps since the last report, which replaces it
        self.step_meter: Meter | None = None  # of this optimizer step
        self.step_loss: Tensor | None = None  # of this process, this optimizer step
        self.validation_meter: Meter | None = None
        self.counters: Tensor | None = None  # float64 since this start, see COUNTERS
        self.gradient_norm: Tensor | None = None
        self.compilation = Compilation()
        self._is_configured = False

    @property
    def model(self) -> BlockDiffusionLM:
        return self.scoring.model

    def setup(self, stage: str) -> None:
        """Give the layers their training form.

        Not in configure_model: DeepSpeed replaces torch.arange and others around it, and the first use of torch.compile
        notes for good which functions torch has. The loss, compiled later, would break where it calls the true ones.
        """
        torch._dynamo.config.optimize_ddp = False  # it would cut the layers' graphs at the buckets of DDP
        self.scoring.use_training_form(self.recompute, self.compile_layers)
        gather_whole_layers(self.trainer.strategy, self.model.qwen.model.layers, self.compile_layers)
        keep_batches_exact(self.trainer.strategy)

    def configure_model(self) -> None:
        """Have the strategy shard the layers; Lightning may call this twice."""
        if self._is_configured:
            return
        self._is_configured = True
        if self.device_mesh is not None:
            shard(self.scoring, self.model.qwen.model.layers, self.device_mesh, self.compute_dtype)

    def configure_optimizers(self) -> dict:
        """Return AdamW (fused, unless fp16's loss scaling must see the gradients first) and its schedule."""
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
            fused=self.compute_dtype != torch.float16,
        )
        max_steps = self.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, max_steps, config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the global norm and keep it for the log; if it is not finite, have AdamW leave out this step.

        Lightning's own form refuses a fused optimizer also where it would be right (bf16). DeepSpeed clips and skips by
        itself. The mark is the one that torch's loss scaling uses: it skips on the device, without waiting for it.
        """
        self.gradient_norm = clip_gradients(self, optimizer, gradient_clip_val or math.inf)
        if self.gradient_norm is not None and optimizer.defaults["fused"]:
            optimizer.found_inf = (~self.gradient_norm.isfinite()).float()

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
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.float64, device=self.device)
        self.meter = self.scoring.new_meter(self.device, num_steps=0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the micro-batch's part of the loss, scaled for the mean over processes and micro-batches to come."""
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self.step_loss = torch.zeros((), device=self.device)
            self.step_meter = self.scoring.new_meter(self.device)
        with self.compilation.settled():
            scores, objective = self._score(batch)
        self.step_loss += objective.detach()
        self.step_meter.add(scores, objective, batch["num_tokens"])
        counts = (batch["num_tokens"].sum(), scores.num_rows, scores.operations, scores.num_empty_rows)
        for number, count in enumerate(counts):
            self.counters[number] += count
        finite = 1 + 0 * objective.detach()  # else NaN, so that a loss of inf is found in the gradients
        # under DeepSpeed both Lightning and the engine divide by the number of micro-batches
        averages = accumulate**2 if self.trainer.strategy.handles_gradient_accumulation else accumulate
        return objective * finite * (self.trainer.world_size * averages)

    def _score(self, batch: dict[str, Tensor]) -> tuple[Scores, Tensor]:
        """Return the scores and their sum over the number of targets in the whole optimizer step, float32 []."""
        with self.compilation.complete():
            scores = self.scoring(batch)
        return scores, scores.total / batch["step_targets"][0]

    def is_reported(self, step: int) -> bool:
        """Return whether optimizer step `step` (from 1) goes to the log."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def on_validation_start(self) -> None:
        self.validation_meter = self.scoring.new_meter(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores, objective = self._score(batch)
        self.validation_meter.add(scores, objective, batch["num_tokens"])

    def data_tokens(self) -> int:
        """Return the document tokens of the run so far, over all processes, which must all call this."""
        since_start = 0 if self.counters is None else int(add_over_processes(self.counters)[0])
        return self.earlier_data_tokens + since_start


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name
