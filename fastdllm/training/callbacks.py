"""What a run reports: one line and the TensorBoard values, validation, decoded text; and its time limit."""

import math
import resource
from collections.abc import Callable
from datetime import timedelta

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.tensorboard import SummaryWriter

from fastdllm.decoding.engine import Engine
from fastdllm.decoding.rows import Completion, Request
from fastdllm.decoding.trace import TraceStep
from fastdllm.runtime import device_name, peak_flops
from fastdllm.training.clock import Clock
from fastdllm.training.faults import is_skipped
from fastdllm.training.meter import add_over_processes
from fastdllm.training.module import COUNTERS, AdaptModule, learning_rate_factor
from fastdllm.training.strategies import deepspeed_gradient_norm
from fastdllm.training.unmasking import Unmasking, can_draw


class Progress(Callback):
    """Logs the step's loss and sums, throughput, memory and validation, and prints one line each time."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.reported_step = 0
        self.first_step = 0
        self._since = (0.0, [0.0] * len(COUNTERS))  # seconds and counters at the last report
        self._loss = math.nan
        self._idle_since = 0.0  # when the last batch was done with
        self._waited = 0.0  # seconds without a batch since the last report

    def on_train_start(self, trainer: Trainer, module: AdaptModule) -> None:
        self.clock.start()
        self.first_step = self.reported_step = trainer.global_step
        if trainer.is_global_zero and peak_flops(module.device) is None:
            print(f"no MFU is logged: the peak of {device_name(module.device)} is not known", flush=True)

    def on_train_batch_start(self, trainer: Trainer, module: AdaptModule, batch, batch_idx: int) -> None:
        self._waited += self.clock.seconds() - self._idle_since

    def on_train_batch_end(self, trainer: Trainer, module: AdaptModule, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            module.meter.add_step(module.step_meter, is_skipped(trainer, module))
            self._report(trainer, module)
        self._idle_since = self.clock.seconds()

    def _report(self, trainer: Trainer, module: AdaptModule) -> None:
        step = trainer.global_step
        if not (module.is_reported(step) or trainer.should_stop):
            return
        values = {f"train/{name}": value for name, value in module.meter.read().items()}
        module.meter = module.scoring.new_meter(module.device, num_steps=0)
        self._loss = float(add_over_processes(module.step_loss))
        values |= self._optimizer_values(trainer, module, step) | self._throughput(trainer, module)
        _log(trainer, values, step)
        self.reported_step = step
        if trainer.is_global_zero:
            print(self._line(step, trainer.max_steps, values), flush=True)

    def on_train_end(self, trainer: Trainer, module: AdaptModule) -> None:
        if trainer.is_global_zero:
            # every digit, so that two runs can be compared
            print(f"trained to step {self.reported_step}: loss {self._loss!r}", flush=True)

    def _optimizer_values(self, trainer: Trainer, module: AdaptModule, step: int) -> dict[str, float]:
        config = module.optimizer_config
        rate = config.learning_rate * learning_rate_factor(step - 1, module.max_steps, config)
        norm = deepspeed_gradient_norm(trainer.strategy)
        norm = module.gradient_norm if norm is None else norm
        return {"optim/lr": rate} | ({} if norm is None else {"optim/grad_norm": float(norm)})

    def _throughput(self, trainer: Trainer, module: AdaptModule) -> dict[str, float]:
        counters = add_over_processes(module.counters).tolist()  # waits for the device
        seconds = self.clock.seconds()
        spent = seconds - self._since[0]
        tokens, rows, operations, empty = (now - then for now, then in zip(counters, self._since[1], strict=True))
        self._since = (seconds, counters)
        values = {"throughput/tokens_per_second": tokens / spent, "throughput/rows_per_second": rows / spent}
        values |= {"throughput/rows_per_token": rows / tokens, "throughput/empty_rows": empty / rows}
        values["throughput/data_wait"] = self._waited / spent
        self._waited = 0.0
        values["data/tokens"] = module.earlier_data_tokens + counters[0]
        device = module.device
        if device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            values["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # counted in KiB
        peak = peak_flops(device)
        if peak is not None:
            values["throughput/mfu"] = operations / spent / (peak * trainer.world_size)
        return values

    def _line(self, step: int, max_steps: int, values: dict[str, float]) -> str:
        done = step - self.first_step
        eta = timedelta(seconds=round(self.clock.wall_seconds() / done * (max_steps - step)))
        accuracy = values.get("train/masked_accuracy", values.get("train/next_token_accuracy", math.nan))
        accepted = values.get("train/accepted_length")
        accepted = "" if accepted is None else f"  accepted {accepted:.2f}"
        loss = values.get("train/loss", math.nan)  # all steps were skipped
        return (
            f"step {step}/{max_steps}  loss {loss:.6f}  accuracy {accuracy:.4f}{accepted}  "
            f"lr {values['optim/lr']:.2e}  {values['throughput/tokens_per_second']:,.0f} tokens/s  eta {eta}"
        )

    def on_validation_start(self, trainer: Trainer, module: AdaptModule) -> None:
        self.clock.pause()

    def on_validation_end(self, trainer: Trainer, module: AdaptModule) -> None:
        self.clock.resume()
        values = {f"val/{name}": value for name, value in module.validation_meter.read().items()}
        _log(trainer, values, trainer.global_step)
        accuracy = values.get("val/masked_accuracy", values.get("val/next_token_accuracy", math.nan))
        if trainer.is_global_zero:
            step, loss = trainer.global_step, values["val/loss"]
            print(f"validation at step {step}: loss {loss:.6f}  accuracy {accuracy:.4f}", flush=True)


def _log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    if trainer.logger is not None:
        trainer.logger.log_metrics(values, step)  # Lightning's loggers write on the first process only


class TimeLimit(Callback):
    """Ends training after the first optimizer step beyond the limit, on all processes at the same step."""

    def __init__(self, max_minutes: float, clock: Clock):
        self.max_minutes, self.clock = max_minutes, clock

    def on_train_batch_end(self, trainer: Trainer, module: AdaptModule, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        is_over = trainer.strategy.broadcast(self.clock.wall_seconds() > 60 * self.max_minutes)
        if is_over and trainer.global_step < trainer.max_steps:
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"max_minutes {self.max_minutes:g} reached at step {trainer.global_step}: stopping", flush=True)


class TextSamples(Callback):
    """Decodes a few prompts every `every` optimizer steps, on the first process, which must hold all weights.

    With `trace` the first prompt is decoded by it, alone, and how it was unmasked is shown as text and as a figure.
    """

    def __init__(
        self,
        *,
        every: int,
        make_requests: Callable[[], list[Request]],
        make_engine: Callable[..., Engine],
        trace: Callable[..., tuple[Completion, list[TraceStep]]] | None,
        clock: Clock,
    ):
        self.every, self.make_requests, self.make_engine, self.clock = every, make_requests, make_engine, clock
        self.trace = trace
        self.shown_step = 0

    def on_train_start(self, trainer: Trainer, module: AdaptModule) -> None:
        self.shown_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: AdaptModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.shown_step or step % self.every or trainer.should_stop or not trainer.is_global_zero:
            return
        self.shown_step = step
        with self.clock.paused():
            requests = self.make_requests()
            completions, steps = self._decode(module, requests)
            text = "\n\n".join(_markdown(completion) for completion in completions)
            board, first = trainer.logger.experiment, completions[0]
            board.add_text("samples/text", text, step)
            if self.trace:
                _show_unmasking(board, Unmasking.of(module.model, requests[0], first, steps), step)
        print(f"sample at step {step}: {first.text[:100]!r} ({_passes(first)})", flush=True)

    def _decode(self, module: AdaptModule, requests: list[Request]) -> tuple[list[Completion], list[TraceStep]]:
        """Return the answers in the order of the prompts, and the passes of the first one if it is traced.

        Layers run uncompiled: new shapes would recompile them.
        """
        first, *others = requests
        with torch.compiler.set_stance("force_eager"):
            traced, steps = self.trace(module.model, request=first) if self.trace else (None, [])
            engine = self.make_engine(module.model)
            answers = engine.run(others if traced else requests)
            completions = sorted(answers, key=lambda completion: completion.index)
        module.model.train()
        return [traced, *completions] if traced else completions, steps


def _show_unmasking(board: SummaryWriter, unmasking: Unmasking, step: int) -> None:
    """Write how an answer was unmasked; without matplotlib as text alone."""
    board.add_text("samples/unmasking", unmasking.describe(), step)
    if can_draw():
        board.add_figure("samples/unmasking", unmasking.draw(f"optimizer step {step}"), step)


def _passes(completion: Completion) -> str:
    passes = completion.prefill_passes + completion.denoise_passes + completion.append_passes
    return f"{completion.counted_tokens} tokens in {passes} forward passes"


def _markdown(completion: Completion) -> str:
    return f"**{_passes(completion)}**\n\n```\n{completion.text}\n```"
