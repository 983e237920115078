"""fastdllm: turn a pretrained Qwen2.5 into a block-diffusion language model, decode it in parallel, measure it."""

from fastdllm.decoding.engine import DecodeConfig, Engine
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Completion, Request
from fastdllm.decoding.text import TextGenerator, load

__all__ = ["Completion", "DecodeConfig", "Engine", "Request", "ReuseConfig", "TextGenerator", "load"]
