"""The outside baseline: transformers' own AR decoding, behind the same `run` as our engine."""

import time
from collections.abc import Collection, Iterator
from typing import Any

import torch

from fastdllm.decoding.engine import stop_token_ids
from fastdllm.decoding.pieces import cut_text
from fastdllm.decoding.reference import decode_with_transformers
from fastdllm.decoding.rows import Completion, Request
from fastdllm.model import BlockDiffusionLM


class TransformersEngine:
    """Owns nothing but its clock. It stops at stop tokens only: tokens after a stop string are decoded and counted."""

    def __init__(self, model: BlockDiffusionLM, tokenizer: Any, batch_size: int):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.stop_ids = stop_token_ids(tokenizer)
        self.seconds = 0.0
        self.decode_seconds = None  # transformers does not tell prefill from decoding

    def free(self) -> None:
        """Nothing is kept between runs."""

    def run(self, requests: list[Request], skip: Collection[int] = ()) -> Iterator[Completion]:
        """Answer every request but those whose indices are in `skip`, batch by batch in order.

        A batch is left out when all of it is skipped, else run whole: what a row takes depends on its batch.
        """
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            wanted = [index for index in range(start, start + len(batch)) if index not in skip]
            if not wanted:
                continue
            started = time.perf_counter()
            answers = decode_with_transformers(
                self.model,
                [request.prompt for request in batch],
                max_new_tokens=max(request.max_new_tokens for request in batch),
                stop_ids=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            self.seconds += time.perf_counter() - started
            longest = max(map(len, answers))
            for index in wanted:
                request, tokens = batch[index - start], answers[index - start]
                yield self._completion(index, request, tokens[: request.max_new_tokens], longest)

    def _completion(self, index: int, request: Request, tokens: list[int], longest: int) -> Completion:
        """Return the answer; each token counts as one pass, and a row stays in its batch to the end."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens
        text = cut_text(self.tokenizer.decode(kept, skip_special_tokens=False), request.stop_strings)
        return Completion(
            index=index,
            tokens=tokens,
            text=text,
            counted_tokens=len(tokens),
            computed_tokens=longest,
            prefill_passes=1,
            denoise_passes=len(tokens),
            append_passes=0,
            full_passes=0,
            layers_run=longest * self.model.num_layers,
        )
