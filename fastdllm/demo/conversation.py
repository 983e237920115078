"""From a conversation to a request of the service, and from what comes back to text: for the terminal and the page."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.config import DecodeConfig, check_decoding
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, VERIFIED, check_parameter
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Request
from fastdllm.decoding.text import chat_prompt
from fastdllm.model import BlockDiffusionLM

Mode = Literal["diffusion", "ar", "verified"]
Message = dict[str, str]
MASKED = "░"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How answers are decoded."""

    mode: Mode
    """diffusion: by blocks; ar: token by token; verified: drafts, each checked as in ar."""
    threshold: float = DEFAULT_THRESHOLD
    """Mode diffusion: confidence in (0, 1] above which a proposal is accepted."""
    reuse_k: int = 1
    """Mode diffusion: layers are refreshed at every k-th denoising step; 1: no reuse."""
    subset: str = "first"
    """Layers that are reused: first, middle, last, or indices such as 3,4,5."""


class Speaker:
    """Knows a loaded model: what can be asked of it, and how a conversation becomes a request."""

    def __init__(
        self, model: BlockDiffusionLM, tokenizer: PreTrainedTokenizerBase, mode: str, decode: DecodeConfig, limit: int
    ):
        """Take what `fastdllm.load` found, mode and decoding of the checkpoint.

        Args:
            limit: tokens of a conversation, the answer included.
        """
        self.model, self.tokenizer, self.decode, self.limit = model, tokenizer, decode, limit
        self.usual = ChatSettings(mode=VERIFIED if decode.is_verified else mode, threshold=decode.threshold)

    def check(self, settings: ChatSettings) -> None:
        """Raise a ValueError if this model cannot be asked so; it says why, and what would do."""
        if settings.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {settings.mode!r}.")
        has_adapter = self.model.gate is not None
        if settings.mode == "diffusion" and has_adapter:
            raise ValueError(
                "the adapter drafts for mode verified alone; to decode by blocks, start without --adapter."
            )
        if settings.mode == "diffusion" and self.usual.mode == "ar":
            raise ValueError(
                "this checkpoint was never adapted to block diffusion, only mode ar is there; train.py does."
            )
        drafts = has_adapter or (self.usual.mode == "diffusion" and self.model.context_attention == "causal")
        if settings.mode == "verified" and not drafts:
            raise ValueError(
                "mode verified needs an adapter that drafts (start with --adapter FOLDER), or a checkpoint that was "
                "adapted with context_attention causal."
            )
        check_parameter("threshold", settings.threshold)
        check_decoding(
            *self.options(settings),
            block_size=self.model.block_size,
            num_layers=self.model.num_layers,
            context_attention=self.model.context_attention,
            has_adapter=has_adapter,
        )
        self._reuse(settings).layers(self.model.num_layers)  # also where it rests

    def _reuse(self, settings: ChatSettings) -> ReuseConfig:
        return ReuseConfig(reuse_k=settings.reuse_k, subset=settings.subset)

    def options(self, settings: ChatSettings) -> tuple[str, DecodeConfig, ReuseConfig]:
        """Return mode, decode and reuse of an engine; threshold and reuse rest where there are no blocks."""
        policy = VERIFIED if settings.mode == "verified" else "threshold"
        decode = dataclasses.replace(self.decode, policy=policy, threshold=DEFAULT_THRESHOLD)
        is_reusing = settings.mode == "diffusion" and settings.reuse_k != 1
        reuse = self._reuse(settings) if is_reusing else ReuseConfig()  # one engine for all that reuse nothing
        return "ar" if settings.mode == "ar" else "diffusion", decode, reuse

    def request(self, messages: Sequence[Message], settings: ChatSettings, max_new_tokens: int, seed: int) -> Request:
        """Return what asks for the next answer, as long as there is room for.

        Raises:
            ValueError: the conversation fills the limit, or is not one that the model's template takes.
        """
        try:
            prompt = chat_prompt(self.tokenizer, list(messages))
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None
        room = self.limit - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and leaves no room for an answer: the limit is "
                f"{self.limit}; begin a new one (/new), or say it shorter."
            )
        return Request(
            prompt=prompt,
            max_new_tokens=min(max_new_tokens, room),
            parameter=settings.threshold if settings.mode == "diffusion" else None,
            seed=seed,
        )

    def draft_pieces(self, draft: Sequence[int | None], stop_ids: frozenset[int]) -> list[str | None]:
        """Return the text of what is not final: of each run of unmasked places, and None for each masked one.

        What stands behind a stop token will not be part of the answer.
        """
        pieces: list[str | None] = []
        known: list[int] = []
        for token in [*draft, None]:
            if token is not None and token not in stop_ids:
                known.append(token)
                continue
            pieces += [self.tokenizer.decode(known, skip_special_tokens=False)] if known else []
            pieces.append(None)
            known = []
            if token is not None:
                break
        return pieces[:-1]


class Moment(NamedTuple):
    """What one update of an answer changes."""

    text: str
    """Fresh final text."""
    draft: list[str | None]
    """What stands behind all final text and may still change; None: masked."""


class Cost(NamedTuple):
    """What an answer took."""

    num_tokens: int
    seconds: float
    tokens_per_forward: float
    """Over denoising and append passes."""
    num_prompt_tokens: int
    cached_tokens: int
    """Of the prompt, kept from an earlier turn."""

    def __str__(self) -> str:
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.num_tokens} tokens · {rate:,.0f} tokens/s · {self.tokens_per_forward:.2f} tokens per forward · "
            f"{self.cached_tokens} of {self.num_prompt_tokens} prompt tokens kept"
        )
