"""One pass of the drafting objective: clean rows without a gradient, and windows of mask rows with one."""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from fastdllm.adapter import adapter_weights
from fastdllm.draft import DraftConfig, clean_places, draft_flops, draft_size, draft_windows
from fastdllm.masks import DraftMaskBuilder, SeenPlaces, dense_attention_mask, draft_attention
from fastdllm.model import BlockDiffusionLM, KeyValues, Recompute, keys_and_values, run_rows, training_form
from fastdllm.objective import Targets, token_losses
from fastdllm.training.meter import DraftMeter, Scores


class DraftPass(nn.Module):
    """Takes the place of TrainingPass for a model with a gated adapter.

    Layer by layer: the clean rows, as the frozen model has them, leave their keys and values, and are done with; then
    the windows' rows attend to these and to their own. Nothing of the clean rows is kept for the backward pass but what
    attention read of them.
    """

    def __init__(self, model: BlockDiffusionLM, draft: DraftConfig):
        super().__init__()
        self.model, self.draft = model, draft
        self.num_updates = sum(weight.numel() for weight in adapter_weights(model).values() if weight.ndim > 1)
        self._builders: dict[tuple, DraftMaskBuilder] = {}
        self._run_clean, self._run_windows, self._read_clean = run_rows, run_rows, keys_and_values

    def use_training_form(self, recompute: Recompute, is_compiled: bool) -> None:
        """Run the rows in their form for training from now on; clean ones have no backward pass to recompute for."""
        self._run_clean = training_form(run_rows, "none", is_compiled)
        self._read_clean = training_form(keys_and_values, "none", is_compiled)
        self._run_windows = training_form(run_rows, recompute, is_compiled)

    def new_meter(self, device: torch.device, num_steps: int = 1) -> DraftMeter:
        """Return what counts scores of this pass."""
        return DraftMeter(device, num_steps, window=self.draft.window)

    def forward(self, batch: dict[str, Tensor]) -> Scores:
        """Return the scores of a collated batch."""
        model, tokens, position = self.model, batch["tokens"], batch["position"]
        windows, seen = draft_windows(batch, self.draft), clean_places(position)
        masked = torch.full_like(windows.position, model.mask_token_id)
        with torch.no_grad():
            clean, clean_rotary = model.embed(tokens, position)
        rows, rotary = model.embed(masked, windows.position)
        clean_mask = self._attention_mask(seen, tokens.shape[1], window=0)
        mask = self._attention_mask(windows.seen, tokens.shape[1], self.draft.window)
        for number, layer in enumerate(model.qwen.model.layers, start=1):
            is_last = number == model.num_layers
            clean, context = self._clean_rows(layer, clean, clean_rotary, clean_mask, is_last)
            model.gate.rows = True  # and so it stays until the backward pass is over, which may compute layers again
            rows, _ = self._run_windows(layer, rows, rotary, mask, context)
        return self._scores(model.norm(rows), windows.targets, draft_size(seen, windows, self.draft.window))

    @torch.no_grad()
    def _clean_rows(
        self, layer, clean: Tensor, rotary: tuple[Tensor, Tensor], attention_mask, is_last: bool
    ) -> tuple[Tensor, KeyValues]:
        """Return what the frozen layer makes of clean rows (the last one: nothing), and their keys and values."""
        self.model.gate.rows = False
        if is_last:
            return clean, self._read_clean(layer, clean, rotary)
        return self._run_clean(layer, clean, rotary, attention_mask)

    def _scores(self, hidden: Tensor, targets: Targets, size) -> Scores:
        qwen = self.model.qwen
        targets = Targets(*(tensor.flatten() for tensor in targets))
        total, loss, is_correct = token_losses(hidden.flatten(0, 1), qwen.lm_head.weight, targets.token, targets.weight)
        num_rows = size.num_clean_rows + size.num_window_rows
        operations = draft_flops(qwen.config, size, self.num_updates)
        return Scores(total, loss, is_correct, targets, num_rows, operations, (targets.weight == 0).sum())

    def _attention_mask(self, seen: SeenPlaces, num_clean: int, window: int) -> Tensor | BlockMask:
        (batch_size, num_rows), device = seen.first.shape, seen.first.device
        if device.type != "cuda":  # FlexAttention has no backward pass on the CPU
            predicate = draft_attention(seen, num_clean, window)
            num_keys = num_clean + (num_rows if window else 0)
            return dense_attention_mask(predicate, batch_size, num_keys, device, num_rows)
        shape = (batch_size, num_rows, num_clean, window)
        if shape not in self._builders:
            self._builders[shape] = DraftMaskBuilder(*shape, device)
        return self._builders[shape].build(seen)
