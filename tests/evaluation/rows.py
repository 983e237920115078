"""Rows and cells without a model."""

from fastdllm.evaluation.results import Counts, make_row, ratios
from fastdllm.evaluation.scoring import score
from fastdllm.evaluation.sweep import USUAL, Cell, make_cell


def cell(**changes) -> Cell:
    settings = {**USUAL, "top_p": 0.95, "label": "tiny", "task": "toy", "mode": "diffusion"}
    return make_cell({**settings, "reuse_k": 1, "subset": "first", **changes})


def fake_row(of: Cell, checkpoint_hash: str = "c0ffee", **fields):
    """Return a row of `of` with made-up counts: 60 tokens in 20 + 10 passes and 4 seconds; 3 of 4 problems right."""
    counts = Counts(
        counted_tokens=60,
        computed_tokens=64,
        prefill_passes=4,
        denoise_passes=20,
        append_passes=None if of.settings["mode"] == "ar" else 10,
        full_passes=None if of.settings["mode"] == "ar" else 12,
        layers_run=240,
        seconds=4.0,
        decode_seconds=3.0,
    )
    names = ("label", "engine", "task", "mode", "policy", "threshold", "reuse_k", "subset", "reuse_mode")
    facts = {name: of.settings[name] for name in (*names, "use_block_cache", "sub_block_size", "batch_size")}
    made = {
        **facts,
        **score([1, 1, 0, 1], ["numbers", "numbers", "forms", "forms"]),
        **vars(counts),
        **ratios(counts),
        "cell": of.name,
        "model": "data/tiny",
        "checkpoint_hash": checkpoint_hash,
        "data_tokens": 1000,
        "metric": "exact_match,flexible-extract",
        "device": "cpu",
        "dtype": "float32",
        "revision": "0123456789abcdef",
        "is_dirty": False,
        "config": of.settings,
        "config_digest": of.digest,
    }
    return make_row(**{**made, **fields})
