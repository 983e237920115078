"""What a slot's phase, and the first masked place of its block, decide: tables in which passes look it up."""

from itertools import product

import torch
from torch import Tensor

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.state import COUNTERS, NUMBERS, Phase

FUSED = len(Phase)  # beside the phases: an append that was the next block's first denoising step too
DENOISED = dict(denoise_passes=1, step=1, draws=1)  # what each denoising step counts


PASSES: dict[str, tuple[str, dict[str, bool]]] = {  # kind -> method of Steps and its options
    "block": ("block", {}),
    "universal": ("block", {"is_universal": True}),
    "sub_block": ("sub_block", {}),
    "reuse": ("sub_block", {"is_reused": True}),
    "token": ("token", {}),
    "probe": ("probe", {}),
    "refresh": ("rest", {"is_reused": False}),
    "reuse_rest": ("rest", {"is_reused": True}),
}
KINDS = {  # the kind of pass that serves a phase
    Phase.PREFILL: "prefill",
    Phase.APPEND: "block",
    Phase.FULL: "block",
    Phase.SUB_BLOCK: "sub_block",
    Phase.REUSE: "reuse",
    Phase.TOKEN: "token",
    Phase.PROBE: "probe",
    Phase.REFRESH: "refresh",
    Phase.REUSE_REST: "reuse_rest",
    Phase.VERIFY: "verify",
}


def by_name(amounts: dict[str, int], others: int = 0) -> Tensor:
    """Return the amounts in the order of a slot's numbers."""
    return torch.tensor([amounts.get(name, others) for name in NUMBERS + COUNTERS])


def block_roles(is_universal: bool) -> Tensor:
    """Return what a pass over whole blocks is to a slot, by its phase, [phases, 4] bool.

    An append, a full denoising step, any denoising step, anything at all.
    """
    denoised = (Phase.FULL, Phase.SUB_BLOCK) if is_universal else (Phase.FULL,)
    rows = [(phase == Phase.APPEND, phase == Phase.FULL, phase in denoised) for phase in Phase]
    return torch.tensor([(*row, any(row)) for row in rows])


def block_changes(num_layers: int, block_size: int, width: int) -> Tensor:
    """Return how a pass over whole blocks, of `width` rows each, changes the numbers of a slot, by its phase or FUSED.

    Returns: [phases + 1, 2, numbers] int64: what the number is multiplied with, 0 or 1, and what is then added.
    """
    run = dict(layers_run=num_layers, rows_run=num_layers * width)
    append, full = dict(run, append_passes=1, start=block_size), dict(DENOISED, full_passes=1, has_cache=1)
    begun = dict(step=0, offset=0, has_cache=0)
    changes = {
        Phase.APPEND: (begun, append),
        Phase.FULL: (dict(has_cache=0), run | full),
        Phase.SUB_BLOCK: ({}, run | DENOISED),
        FUSED: (begun, append | full),
    }
    rows = [changes.get(phase, ({}, {})) for phase in (*Phase, FUSED)]
    return torch.stack([torch.stack([by_name(kept, others=1), by_name(added)]) for kept, added in rows])


def next_steps(block_size: int, decode: DecodeConfig, reuse: ReuseConfig) -> Tensor:
    """Return what comes after a block whose first masked place is known, [2, 2, D + 1, 2] int64: phase, offset.

    By whether the block has its own keys and values, whether the reused layers are not to be refreshed, and that place,
    D if there is none.
    """
    size = decode.sub_block_size

    def phase(has_cache: int, is_reused: int, first: int) -> Phase:
        if first == block_size:
            return Phase.APPEND
        # only a full pass gives a sub-block's first token
        if not decode.use_block_cache or not has_cache or first % size == 0:
            return Phase.FULL
        if is_reused:
            return Phase.REUSE
        return Phase.PROBE if reuse.is_adaptive else Phase.SUB_BLOCK

    steps = [
        (phase(has_cache, is_reused, first), min(first // size * size, block_size - size))
        for has_cache, is_reused, first in product((0, 1), (0, 1), range(block_size + 1))
    ]
    return torch.tensor(steps).view(2, 2, block_size + 1, 2)
