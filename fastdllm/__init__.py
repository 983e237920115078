"""fastdllm: turn a pretrained Qwen2.5 into a block-diffusion language model, decode it in parallel, measure it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdllm.decoding.engine import DecodeConfig, Engine
    from fastdllm.decoding.reuse import ReuseConfig
    from fastdllm.decoding.rows import Completion, Request
    from fastdllm.decoding.text import TextGenerator, load

__all__ = ["Completion", "DecodeConfig", "Engine", "Request", "ReuseConfig", "TextGenerator", "load"]

# Read when first used: a process that cuts text into tokens imports this package too, and the model takes five seconds.
_MODULES = {"Completion": "rows", "DecodeConfig": "engine", "Engine": "engine", "Request": "rows"}
_MODULES |= {"ReuseConfig": "reuse", "TextGenerator": "text", "load": "text"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastdllm' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f"fastdllm.decoding.{_MODULES[name]}"), name)
