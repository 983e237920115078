"""What measurements of decoding share: the device's rates, models, an engine whose passes can be timed, rows."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from decode_report import make_row  # beside this file
from replay import accepting, draw_accepted, replaying
from shapes import MASK_TOKEN_ID, random_qwen
from transformers import Qwen2ForCausalLM

from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter
from fastdllm.decoding.cache import cache_bytes_per_place
from fastdllm.decoding.drafts import DraftChooser, DraftPlan
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Row
from fastdllm.decoding.state import COUNTERS, NUMBERS, Phase
from fastdllm.model import BlockDiffusionLM
from fastdllm.runtime import code_revision, device_name, get_optimal_dtype, library_versions, pick_device

PHASES = {"token": Phase.TOKEN, "sub_block": Phase.SUB_BLOCK, "full": Phase.FULL, "append": Phase.APPEND}
PHASES |= {"verify": Phase.VERIFY}
BLOCK_SIZE, SUB_BLOCK_SIZE = 32, 8
ADAPTER_RANK = 64
DRAFTS = {"d4": 4, "d7": 7, "d8": 8, "d15": 15, "d16": 16, "chosen": 0}  # how policy verified drafts -> draft_length
SIZES = ((0, 0), (3, 1), (3, 4), (5, 5), (7, 8), (8, 9), (14, 8), (15, 16))  # drafts and groups of a verifying pass
PLANS = {plan.num_rows: plan for plan in (DraftPlan(length, tuple(range(groups))) for length, groups in SIZES)}
REUSES = {
    "none": ReuseConfig(),
    "output_k2": ReuseConfig(reuse_k=2),
    "output_k3": ReuseConfig(reuse_k=3),
    "delta_k2": ReuseConfig(reuse_k=2, reuse_mode="delta", subset="middle"),
    "delta_k3": ReuseConfig(reuse_k=3, reuse_mode="delta", subset="middle"),
    "attn_k2": ReuseConfig(reuse_k=2, reuse_mode="attn", subset="middle"),
    "adaptive": ReuseConfig(schedule="adaptive", budget=0.3, reuse_mode="delta", subset="middle"),
    "trim": ReuseConfig(active_rows="needed"),
}


@dataclass(frozen=True)
class Cell:
    """What is measured; rows are those of one slot in one pass, 0 for answers; of kinds reuse and verified, engine is
    the way."""

    shape: str
    kind: str
    engine: str
    rows: int
    batch_size: int
    context: int

    @property
    def has_answers(self) -> bool:
        """Whether whole answers are measured, and not a pass."""
        return self.kind in ("answers", "reuse", "verified")

    @property
    def is_adapted(self) -> bool:
        """Whether the model has a gated adapter."""
        return self.kind in ("verified", "verify")

    @property
    def name(self) -> str:
        if self.has_answers:
            return f"{self.shape}/{self.kind}/{self.engine}/b{self.batch_size}"
        return f"{self.shape}/{self.kind}/{self.rows}x{self.batch_size}/c{self.context}"


class NoTokenizer:
    """Stands for a tokenizer where there is no text: no token ends an answer."""

    eos_token_id, pad_token_id = -1, 0

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, tokens: list[int], **options: bool) -> str:
        return ""


class TimedEngine(Engine):
    """The engine, with its time to the first token, and slots that can be put right before a pass."""

    first_token_seconds = 0.0

    def _serve(self, waiting: list[Row]) -> Iterator[Row]:
        started, is_first = time.perf_counter(), True
        for row in super()._serve(waiting):
            if is_first:
                self.first_token_seconds, is_first = time.perf_counter() - started, False
            yield row

    def fill(self, cell: Cell) -> list[Row]:
        """Put every slot before the cell's pass, over random keys and values; `advance` then runs it."""
        prompts = random_prompts(cell.batch_size, cell.context)
        waiting = [Request(prompt=prompt, max_new_tokens=2 * self.model.block_size) for prompt in prompts]
        rows = [self._row(index, request) for index, request in enumerate(waiting)]
        self._set_up(rows)
        if self.num_slots < cell.batch_size:
            raise RuntimeError(f"{cell.name} does not fit into the memory: only {self.num_slots} slots do.")
        self.cache.keys.normal_()
        self.cache.values.normal_()
        known = {"append": self.model.block_size, "sub_block": SUB_BLOCK_SIZE + 1}.get(cell.kind, 1)
        for slot, row in enumerate(rows):
            row.slot, row.phase = slot, PHASES[cell.kind]
            row.start = cell.context - (cell.kind in ("token", "verify"))
            numbers = dict(limit=row.limit, prefilled=cell.context, start=row.start, phase=PHASES[cell.kind])
            if cell.kind == "verify":
                numbers |= dict(num_drafts=PLANS[cell.rows].length)
            if cell.kind == "sub_block":
                numbers |= dict(offset=SUB_BLOCK_SIZE, has_cache=1)
            self.state.admit(slot, row.request.prompt, parameter=self.decode.parameter, **numbers)
            self.state.tokens[slot, cell.context : cell.context + known] = slot + 1
        self._kept = {name: getattr(self.state, name).clone() for name in ("tokens", "numbers")}
        return rows

    def reset(self) -> None:
        """Put the slots back to where `fill` left them, without the host."""
        for name, value in self._kept.items():
            getattr(self.state, name).copy_(value)

    @torch.no_grad()
    def advance(self, rows: list[Row]) -> None:
        self._advance(rows)

    def check_pass(self, rows: list[Row]) -> None:
        """Raise RuntimeError if the last pass did not serve every slot."""
        columns = [(NUMBERS + COUNTERS).index(name) for name in ("denoise_passes", "append_passes")]
        counts = (self.state.numbers - self._kept["numbers"])[: len(rows), columns].sum(1)
        if (counts != 1).any():
            raise RuntimeError(f"a timed pass must serve each slot once, got {counts.tolist()}.")


def random_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 50_000, (count, length), generator=generator).tolist()


class Bench:
    """Owns the models, the device's rates and the clock."""

    def __init__(self, trace: list[int], seconds: float, config: dict[str, Any]):
        self.trace, self.seconds, self.config = trace, seconds, config
        self.device, self.started = pick_device(), time.perf_counter()
        self.dtype = get_optimal_dtype(self.device)[0]
        self.models: dict[tuple[str, int], BlockDiffusionLM] = {}
        self.adapted: dict[str, BlockDiffusionLM] = {}
        self.copy_rate, self.read_rate = memory_rates(self.device)
        print(
            f"{device_name(self.device)}, {self.dtype}: copies {self.copy_rate / 1e12:.3f} TB/s, "
            f"reads {self.read_rate / 1e12:.3f} TB/s",
            flush=True,
        )
        commit, is_dirty = code_revision()
        self.facts = {"device": device_name(self.device), "revision": commit, "is_dirty": is_dirty}
        self.facts |= {"versions": library_versions(), "config": config}
        self.facts |= {"copy_bytes_per_second": self.copy_rate, "read_bytes_per_second": self.read_rate}

    def model(self, shape: str, block_size: int = BLOCK_SIZE) -> BlockDiffusionLM:
        if (shape, block_size) not in self.models:
            known = [model.qwen for (name, _), model in self.models.items() if name == shape]
            qwen = known[0] if known else self._make_qwen(shape)
            model = BlockDiffusionLM(qwen, block_size=block_size, mask_token_id=MASK_TOKEN_ID).eval()
            self.models[shape, block_size] = model
        return self.models[shape, block_size]

    def adapted_model(self, shape: str) -> BlockDiffusionLM:
        """Return a model of the shape with a gated adapter of random values, on weights of its own."""
        if shape not in self.adapted:
            options = dict(block_size=BLOCK_SIZE, mask_token_id=MASK_TOKEN_ID, context_attention="causal")
            model = BlockDiffusionLM(self._make_qwen(shape), **options).eval()
            add_adapter(model, AdapterSettings(rank=ADAPTER_RANK), seed=0)
            for weight in adapter_weights(model).values():
                weight.data = (weight.data + 0.01 * torch.randn_like(weight)).to(self.dtype)
                weight.requires_grad_(False)
            self.adapted[shape] = model
        return self.adapted[shape]

    def model_of(self, cell: Cell) -> BlockDiffusionLM:
        """Return the cell's model."""
        if cell.is_adapted:
            return self.adapted_model(cell.shape)
        return self.model(cell.shape, cell.rows if cell.rows > BLOCK_SIZE else BLOCK_SIZE)

    def _make_qwen(self, shape: str) -> Qwen2ForCausalLM:
        qwen = random_qwen(shape, self.device)
        for weight in qwen.parameters():  # buffers keep their float32 angles
            weight.data = weight.data.to(self.dtype)
        # random rows propose their own input, so that the published code would put mask tokens where there were some
        qwen.get_input_embeddings().weight.data[MASK_TOKEN_ID] = 0
        return qwen

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long would end in time."""
        return time.perf_counter() - self.started + seconds < self.seconds

    def engine(self, cell: Cell) -> TimedEngine:
        is_diffusion = cell.engine == "fastdllm" or cell.kind == "reuse" or cell.is_adapted
        decode = DecodeConfig(policy="fixed", sub_block_size=SUB_BLOCK_SIZE)
        if cell.is_adapted:
            decode = DecodeConfig(policy="verified", draft_length=DRAFTS.get(cell.engine, 0))
        engine = TimedEngine(
            self.model_of(cell),
            NoTokenizer(),
            mode="diffusion" if is_diffusion else "ar",
            decode=decode,
            reuse=REUSES[cell.engine] if cell.kind == "reuse" else None,
            batch_size=cell.batch_size,
            is_graphed=self.config["graphs"] and self.device.type == "cuda",
            is_fused=self.config["fused"] and self.device.type == "cuda",
        )
        if cell.is_adapted:
            accepted = draw_accepted(self.config["acceptance"], self.config["accepted"])
            engine.steps_class = accepting(accepted)
            engine._drafts = DraftChooser(PLANS[cell.rows]) if cell.kind == "verify" else engine._drafts
        else:
            engine.steps_class = replaying(self.trace)
        return engine

    def elapsed(self, call: Callable[[], Any]) -> float:
        """Return the seconds that a call takes on the device, from when all before it is done."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, call: Callable[[], Any]) -> tuple[float, float, Any]:
        """Return the seconds of a call, its peak memory in bytes above what was there, and its result."""
        is_cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if is_cuda else 0
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = call()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) * is_cuda, result

    def row(self, cell: Cell, seconds: float, places: float, peak_bytes: int, **values: Any) -> dict[str, Any]:
        """Return the cell's row; a pass took `seconds` and saw `places` of each slot. The weights count as memory."""
        model = self.model_of(cell)
        weights = sum(weight.numel() * weight.element_size() for weight in model.qwen.parameters())
        minimum = weights + cell.batch_size * places * cache_bytes_per_place(model)
        return make_row(
            **{"cell": cell.name} | asdict(cell) | self.facts | values,
            ms_per_forward=1e3 * seconds,
            bandwidth_fraction=minimum / self.copy_rate / seconds,
            bandwidth_fraction_of_read=minimum / self.read_rate / seconds,
            peak_memory_gb=(peak_bytes + weights) / 1e9 if peak_bytes else None,
        )


def memory_rates(device: torch.device) -> tuple[float, float]:
    """Return bytes per second of a copy (read and written ones counted) and of a sum over float32 (read ones)."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**24, device=device)
    target, rates = torch.empty_like(source), []
    for call, factor in ((lambda: target.copy_(source), 2), (source.sum, 1)):
        times = []
        for _ in range(12):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates.append(factor * source.numel() * 4 / statistics.median(times[2:]))
    return rates[0], rates[1]


def spread(values: list[float]) -> float:
    """Return the distance of the 10th to the 90th percentile, as a share of the median."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return float((high - low) / middle)
