"""What the device knows of every slot: tokens, where its current block stands, the pass that comes next, counts.

A slot is a place for one request. All of it are tensors that passes change in place, so that a pass is the same
sequence of kernels at each step and needs no answer from the host.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Phase(IntEnum):
    """The pass that a slot needs next."""

    IDLE = 0
    """None: nobody has it, or its answer is complete."""
    PREFILL = 1
    """The next chunk of its prompt."""
    APPEND = 2
    """Its finished block into the block cache."""
    FULL = 3
    """A denoising step over its whole block."""
    SUB_BLOCK = 4
    """A denoising step over its current sub-block."""
    REUSE = 5
    """The same, with the reused layers left out."""
    TOKEN = 6
    """One token, in AR mode."""
    PROBE = 7
    """The first layers of a denoising step over its sub-block: they decide what the others do (schedule adaptive)."""
    REFRESH = 8
    """All other layers of that step."""
    REUSE_REST = 9
    """The other layers of that step, with the reused ones left out."""
    VERIFY = 10
    """Its drafts, by the token-by-token mode (policy verified)."""


COUNTERS = (
    *("prefill_passes", "denoise_passes", "append_passes", "full_passes", "layers_run", "rows_run"),
    *("computed_tokens", "checked_drafts", "accepted_drafts"),
)


NUMBERS = (
    "phase",
    "prompt_length",
    "limit",  # places that prompt and answer may take
    "prefilled",  # places of the prompt in the block cache
    "start",  # first place of the current block; token by token and if drafts are verified, place of the newest token
    "offset",  # of the current sub-block in the block
    "step",  # denoising steps in this block
    "has_cache",  # 1 if the block's own keys and values were computed
    "guess",  # token with which the next block is guessed to begin
    "num_active",  # active rows of the next sub-block step, if those alone are computed
    "num_drafts",  # drafts behind the newest token
    "final",  # places whose tokens nothing can change any more
    "seed",
    "draws",  # steps that have drawn random numbers
)
REPORT_HEAD = 3 + len(COUNTERS)  # numbers of a slot in a report, before its last final tokens


class SlotNumbers:
    """A pass's own copy of the NUMBERS and COUNTERS of some slots: each by its name, [B] int64, to be replaced."""

    def __init__(self, taken: Tensor):
        self.taken = taken
        """[B, NUMBERS + COUNTERS]: what they were in the beginning, whatever was replaced since."""
        self.__dict__.update(zip(NUMBERS + COUNTERS, taken.unbind(1), strict=True))


class SlotState:
    """State of `num_slots` slots; the last one, `spare`, is never used.

    Behind them is a row, `dump`, in which passes write what they find for slots that they do not serve; none reads it.
    """

    def __init__(self, num_slots: int, capacity: int, block_size: int, mask_token_id: int, device: torch.device):
        self.num_slots, self.spare, self.dump, self.mask_token_id = num_slots, num_slots - 1, num_slots, mask_token_id
        self.tokens = torch.full((num_slots + 1, capacity), mask_token_id, device=device)
        """[num_slots + 1, capacity] int64: prompt and answer, mask tokens where nothing is decided."""
        self.numbers = torch.zeros(num_slots + 1, len(NUMBERS + COUNTERS), dtype=torch.int64, device=device)
        """[num_slots + 1, NUMBERS + COUNTERS]: one tensor, which a pass reads and writes in a few kernels."""
        self.phase = self.numbers[:, NUMBERS.index("phase")]
        self.counts = self.numbers[:, len(NUMBERS) :]
        self.parameter = torch.zeros(num_slots, dtype=torch.float32, device=device)
        """[num_slots]: the policy's parameter, such as the threshold."""
        self.is_dirty = torch.zeros(num_slots, block_size, dtype=torch.bool, device=device)
        """[num_slots, D]: places unmasked since their keys and values were computed; kept for active rows alone."""

    def admit(self, slot: int, prompt: list[int], *, parameter: float, **numbers: int) -> None:
        """Put a request into a slot: its prompt, the policy's parameter, and those of NUMBERS that are not 0."""
        known = {"phase": Phase.PREFILL, "prompt_length": len(prompt), "final": len(prompt)} | numbers
        row = to_device(prompt + [known.get(name, 0) for name in NUMBERS + COUNTERS], self.tokens.device)
        self.tokens[slot].fill_(self.mask_token_id)
        self.tokens[slot, : len(prompt)], self.numbers[slot] = row.tensor_split([len(prompt)])
        self.parameter[slot] = parameter
        self.is_dirty[slot] = False

    def release(self, slot: int) -> None:
        """Stop decoding a slot."""
        self.phase[slot] = Phase.IDLE

    def take(self, slots: Tensor) -> SlotNumbers:
        """Return the numbers of `slots` [B] int64."""
        return SlotNumbers(self.numbers[slots])

    def put(self, slots: Tensor, at: SlotNumbers) -> None:
        """Write the numbers of `slots` back."""
        self.numbers[slots] = torch.stack([getattr(at, name) for name in NUMBERS + COUNTERS], dim=1)

    def report(self, tail: int) -> Tensor:
        """Return what the host follows, [num_slots, REPORT_HEAD + tail].

        Phase, final, active rows, counts, last final tokens.
        """
        numbers, tokens = self.numbers[: self.dump], self.tokens[: self.dump]
        phase, final, num_active = (numbers[:, NUMBERS.index(name), None] for name in ("phase", "final", "num_active"))
        places = final + torch.arange(-tail, 0, device=final.device)
        last = tokens.gather(1, places.clamp(min=0))
        return torch.cat([phase, final, num_active, numbers[:, len(NUMBERS) :], last], dim=1)


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return the numbers as int64 on the device, without waiting for what it is doing."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def uniform_draws(seed: Tensor, draws: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each slot, [B, count] float32, as a function of (seed, draws) [B] alone.

    Three rounds of a 64-bit mixing function over seed, draw and place: the same on every device and in every batch.
    """
    place = torch.arange(count, device=seed.device)
    value = _mixed(_mixed(seed[:, None] + 0x1E3779B97F4A7C15) + draws[:, None])
    value = _mixed(value + place)
    return ((value >> 40) & 0xFFFFFF).float() / 2**24


def _mixed(value: Tensor) -> Tensor:
    """Scramble int64 numbers; products wrap around, shifts fill up with zeros: copies of the sign would clear it."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value
