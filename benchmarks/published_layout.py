"""The published training layout, for comparison: each view beside its own clean half, 4 rows for each token.

`PublishedPass` stands in for `TrainingPass`. With `is_plain` it does what the published recipe does: logits of all
noised rows at once, the mask built again at each step, layers uncompiled and recomputed in full in the backward pass.
Without, it runs on this project's kernels: compiled layers, masks from block lists, a loss without logits.
Source: method.md 2.2 to 2.4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from fastdllm.masks import CLEAN, VIEW_A, Rows, count_attention_pairs, training_attention
from fastdllm.model import PassSize, forward_flops
from fastdllm.objective import Targets, block_diffusion_inputs, token_losses
from fastdllm.training.meter import Scores
from fastdllm.training.module import TrainingPass


class PublishedPass(TrainingPass):
    """Two rows of 2L for each sample, [view a | clean] and [view b | clean], stacked along the batch."""

    def __init__(self, model, objective, sample_length: int, is_plain: bool):
        super().__init__(model, objective, sample_length)
        if objective.first_token != "noised" or objective.ar_loss_weight:
            raise ValueError("the published layout has no loss on its clean halves; use first_token noised alone.")
        self.is_plain = is_plain

    def forward(self, batch: dict[str, Tensor]) -> Scores:
        """Return the scores of a collated batch."""
        model, D = self.model, self.objective.block_size
        tokens, _, targets = block_diffusion_inputs(batch, self.objective, model.mask_token_id)
        view_a, view_b, clean = tokens.chunk(3, dim=1)
        rows = _published_rows(batch)
        tokens = torch.cat([torch.cat([view_a, clean], 1), torch.cat([view_b, clean], 1)])  # [2B, 2L]
        targets = Targets(*(torch.cat(tensor.chunk(3, dim=1)[:2]) for tensor in targets))  # [2B, L]
        mask = self._plain_mask(rows) if self.is_plain and tokens.is_cuda else self._attention_mask(rows)
        hidden = model.hidden_states(tokens, rows.position, mask)[:, : view_a.shape[1]]  # the noised half
        if self.is_plain:
            total, loss, is_correct, targets = self._all_logits(hidden, targets)
        else:
            total, loss, is_correct, targets = self._labelled_logits(hidden, targets)
        pairs = count_attention_pairs(rows, D, self._context).sum()
        size = PassSize(tokens.numel(), tokens.numel(), pairs, pairs, len(loss))
        operations = self.num_passes * forward_flops(model.qwen.config, size)
        empty = torch.zeros((), device=tokens.device)
        return Scores(total, loss, is_correct, targets, tokens.numel(), operations, empty)

    def _plain_mask(self, rows: Rows):
        (batch_size, num_rows), D = rows.position.shape, self.objective.block_size
        predicate = training_attention(rows, D, self._context)
        return create_block_mask(predicate, batch_size, None, num_rows, num_rows, device=rows.position.device)

    def _all_logits(self, hidden: Tensor, targets: Targets):
        logits = self.model.qwen.lm_head(hidden).float().flatten(0, 1)  # [2BL, V]
        targets = Targets(*(tensor.flatten() for tensor in targets))
        labels = targets.token.masked_fill(targets.weight == 0, -100)
        loss = F.cross_entropy(logits, labels, reduction="none")
        return (loss * targets.weight).sum(), loss.detach(), logits.detach().argmax(-1) == targets.token, targets

    def _labelled_logits(self, hidden: Tensor, targets: Targets):
        B, L = hidden.shape[0] // 2, hidden.shape[1]
        # of the two views exactly one predicts a token: take that row, [B, L]
        in_first = (targets.weight[:B] > 0).long()
        chosen = hidden.view(2, B, L, -1).gather(
            0, (1 - in_first)[None, :, :, None].expand(-1, -1, -1, hidden.shape[-1])
        )
        by_view = (tensor.view(2, B, L).gather(0, (1 - in_first)[None]).flatten() for tensor in targets)
        targets = Targets(*by_view)
        head = self.model.qwen.lm_head.weight
        return *token_losses(chosen.flatten(0, 2), head, targets.token, targets.weight), targets


def _published_rows(batch: dict[str, Tensor]) -> Rows:
    document, position = (batch[name].repeat(2, 2) for name in ("document", "position"))
    L = batch["document"].shape[1]
    half = torch.where(torch.arange(2 * L, device=document.device) < L, VIEW_A, CLEAN)
    return Rows(half.expand_as(document), document, position)
