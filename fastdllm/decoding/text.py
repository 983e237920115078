"""Text in, text out: a loaded checkpoint that answers prompts."""

import dataclasses
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from fastdllm.checkpoint import Adaptation, load_checkpoint
from fastdllm.decoding.engine import DecodeConfig, Engine
from fastdllm.decoding.pieces import TextPieces
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, VERIFIED
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Request
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import get_optimal_dtype, pick_device


class TextGenerator:
    """Owns a model and its tokenizer.

    `generate` and `stream` take a prompt text (one user turn) or chat messages, and any field of DecodeConfig or
    ReuseConfig as an option, such as threshold=0.9 or reuse_k=2.
    """

    def __init__(
        self,
        model: BlockDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        mode: str,
        decode: DecodeConfig,
        modes: tuple[str, ...] = ("diffusion", "ar"),
    ):
        """Take what answers; `modes` are those that the model has, of which `mode` is used."""
        self.model, self.tokenizer, self.mode, self.decode, self.modes = model, tokenizer, mode, decode, modes
        self._engine: Engine | None = None  # of the last options: it keeps its slots and CUDA graphs

    def generate(
        self, prompt: str | list[dict[str, str]], *, max_new_tokens: int = 512, seed: int = 0, **options
    ) -> str:
        """Return the answer, at most `max_new_tokens` tokens long.

        Raises:
            ValueError: an unknown option, or a value outside its range.
        """
        engine, request = self._prepare(prompt, max_new_tokens, seed, options)
        (completion,) = engine.run([request])
        return completion.text

    def stream(
        self, prompt: str | list[dict[str, str]], *, max_new_tokens: int = 512, seed: int = 0, **options
    ) -> Iterator[str]:
        """Yield the answer in pieces as they become final; joined they equal what `generate` returns."""
        engine, request = self._prepare(prompt, max_new_tokens, seed, options)
        pieces = TextPieces(self.tokenizer, engine.stop_ids)
        yield from filter(None, map(pieces.feed, engine.stream(request)))
        if rest := pieces.finish():  # the limit cut a character in two
            yield rest

    def _prepare(self, prompt, max_new_tokens: int, seed: int, options: dict) -> tuple[Engine, Request]:
        known = {field.name for config in (DecodeConfig, ReuseConfig) for field in dataclasses.fields(config)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}.")
        inert = sorted(set(options) - {"temperature", "top_p"})
        if self.mode == "ar" and inert:
            raise ValueError(f"option {inert[0]!r} has no effect token by token (mode ar); leave it out.")
        blockwise = sorted({"sub_block_size", "use_block_cache"} & set(options))
        if options.get("policy", self.decode.policy) == VERIFIED and blockwise:
            raise ValueError(f"option {blockwise[0]!r} has no effect in policy verified; leave it out.")
        reuse_names = {field.name for field in dataclasses.fields(ReuseConfig)}
        reuse = ReuseConfig(**{name: value for name, value in options.items() if name in reuse_names})
        decode = {name: value for name, value in options.items() if name not in reuse_names}
        if decode.get("policy", "threshold") != "threshold":  # which does not read the remembered threshold
            decode = {"threshold": DEFAULT_THRESHOLD, **decode}
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = chat_prompt(self.tokenizer, messages)
        config = dataclasses.replace(self.decode, **decode)
        engine = self._engine
        if engine is None or engine.is_busy or (engine.decode, engine.reuse) != (config, reuse):
            engine = Engine(self.model, self.tokenizer, mode=self.mode, decode=config, reuse=reuse, batch_size=1)
            self._engine = engine
        return engine, Request(prompt=ids, max_new_tokens=max_new_tokens, seed=seed)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation, by the tokenizer's chat template, up to where the answer begins."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def load(source: str, *, device: str = "auto", mode: str = "auto", adapter: str = "") -> TextGenerator:
    """Return a generator for a checkpoint, in the device's best dtype.

    Args:
        source: hub id, HF folder (an export, a published Fast-dLLM v2 checkpoint, or a plain Qwen2.5) or GGUF file.
        device: auto, cpu, cuda or cuda:N.
        mode: diffusion, ar, or auto: diffusion for an adapted checkpoint, token by token for a plain one.
        adapter: folder of a gated adapter in PEFT's format, which drafts; the answers are the model's own (policy
            verified, in mode diffusion).
    Raises:
        ValueError: diffusion is asked of a checkpoint that was never adapted; an adapter of another checkpoint.
    """
    place = pick_device(device)
    checkpoint = load_checkpoint(source, dtype=get_optimal_dtype(place)[0], device=str(place), adapter=adapter)
    adaptation = checkpoint.adaptation
    if adapter:
        mode = "diffusion" if mode == "auto" else mode
        return TextGenerator(checkpoint.model(), checkpoint.tokenizer, mode, DecodeConfig(policy=VERIFIED))
    if mode == "diffusion" and adaptation is None:
        raise ValueError(f"{source} was never adapted to block diffusion; adapt it with train.py, or use mode ar.")
    if mode == "auto":
        mode = "ar" if adaptation is None else "diffusion"
    remembered = adaptation or Adaptation()
    decode = DecodeConfig(threshold=remembered.threshold, sub_block_size=remembered.sub_block_size)
    modes = ("ar",) if adaptation is None else ("diffusion", "ar")
    return TextGenerator(checkpoint.model(), checkpoint.tokenizer, mode, decode, modes)
