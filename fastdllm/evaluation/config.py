"""The options of `evaluate.py`, refused where they are out of range or contradict one another."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fastdllm.cli import flatten, to_dict
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, PolicyName
from fastdllm.decoding.reuse import ActiveRows, ReuseConfig, ReuseMode, Schedule
from fastdllm.evaluation.sweep import GRID

UNUSED_REUSE = ("first", "output")
LEAST = {"reuse_k": 1, "budget": 0, "batch_size": 1, "max_new_tokens": 0, "limit": 0, "repeat": 1, "trace": 0}


@dataclass(frozen=True, kw_only=True)
class AxesConfig:
    """Lists of values, empty: not varied. The cells are their product around the other settings, each once: what means
    the same is one cell, so a threshold is not varied under policies that have none."""

    checkpoint: list[str] = field(default_factory=list)
    """Checkpoints, one after the other, each into its own run folder unless `run` names one."""
    task: list[str] = field(default_factory=list)
    """Tasks, as in `task`."""
    policy: list[PolicyName] = field(default_factory=list)
    """Policies, those other than threshold with their default parameter."""
    threshold: list[float] = field(default_factory=list)
    """Thresholds in (0, 1]."""
    sub_block_size: list[int] = field(default_factory=list)
    """Tokens; each divides the block size."""
    use_block_cache: list[bool] = field(default_factory=list)
    """Without the sub-block cache nothing is reused, whatever reuse_k."""
    reuse_k: list[int] = field(default_factory=list)
    """As `reuse_k`."""
    subset: list[str] = field(default_factory=list)
    """As `subset`."""
    reuse_mode: list[ReuseMode] = field(default_factory=list)
    """As `reuse_mode`."""
    draft_length: list[int] = field(default_factory=list)
    """Policy verified: drafts of a pass; 0: chosen while decoding."""
    budget: list[float] = field(default_factory=list)
    """As `budget`, for schedule adaptive."""
    active_rows: list[ActiveRows] = field(default_factory=list)
    """As `active_rows`; needed is not varied where layers are reused."""
    batch_size: list[int] = field(default_factory=list)
    """As `batch_size`."""
    max_new_tokens: list[int] = field(default_factory=list)
    """As `max_new_tokens`."""

    def __post_init__(self):
        for threshold in self.threshold:
            if not 0 < threshold <= 1:
                raise ValueError(f"axes.threshold must be in (0, 1], got {threshold}; try 0.9.")
        for name, values in vars(self).items():
            if name in LEAST or name == "sub_block_size":
                _check_least(f"axes.{name}", values, LEAST.get(name, 1))


def _check_least(name: str, values: list[float], least: int) -> None:
    wrong = [value for value in values if not value >= least]
    if wrong:
        raise ValueError(f"{name} must be {least} or more, got {wrong[0]}.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, how it is decoded, and where the rows go."""

    checkpoint: str = ""
    """Hub id, published checkpoint, export, AR folder or .gguf file; empty: the newest export under runs/."""
    adapter: str = ""
    """Folder of a gated adapter in PEFT's format that drafts for the checkpoint, with decode.policy verified; empty:
    none. In mode ar it changes nothing."""
    task: str = ""
    """lm-eval task or group, such as gsm8k; empty: the task that the export remembers."""
    mode: Literal["auto", "ar", "diffusion"] = "auto"
    """auto: diffusion for adapted checkpoints, ar (token by token, causal) for others, which have no other mode."""
    engine: Literal["fastdllm", "transformers"] = "fastdllm"
    """transformers: its own generation loop on the same weights, in mode ar only."""
    reuse_k: int = 1
    """Refresh the layers of `subset` every k-th denoising step, 1 or more; 1: no reuse."""
    subset: str = "first"
    """Layers that may be reused: first, middle, last, or a list of indices such as 3,4,5."""
    reuse_mode: ReuseMode = "output"
    """What stands in for a reused layer: its output (the seed study's definition; output_by_layer really leaves layers
    out for it), delta: the change that it made, attn: what its attention added."""
    schedule: Schedule = "fixed"
    """fixed: refresh by reuse_k; adaptive: when what goes into the layers of `subset` has changed by `budget`, with
    reuse_mode delta or attn and reuse_k left out."""
    budget: float = 0.0
    """Schedule adaptive: summed relative change up to which layers are reused, 0 or more; 0: no reuse, 0.1 is small."""
    active_rows: ActiveRows = "all"
    """Rows that a sub-block step computes; needed: only those that can change (TRIM), not together with reused
    layers."""
    threshold: float = 0.0
    """Confidence in (0, 1] above which a proposal is accepted; 0: decode.threshold if that was changed from 0.9, else
    what the export remembers, else 0.9."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How a block is unmasked; what is left at its default comes from the export where it remembers something else."""
    batch_size: int = 32
    """Problems decoded together, 1 or more."""
    max_new_tokens: int = 0
    """Most new tokens of an answer; 0: the task's own limit, or 2048 where it has none."""
    limit: int = 0
    """First problems of each task that are evaluated; 0: all."""
    prompt: Literal["published", "lm_eval"] = "published"
    """published: 0-shot with "reason step by step" for gsm8k and minerva_math; lm_eval: the task as lm-eval ships it,
    with its own examples. Both use the chat template, but for tasks that ask for completions (docs/tasks.md)."""
    offline: str = ""
    """Folder with evaluation data laid out by hub id (DIR/openai/gsm8k); empty: the hub. data/tiny is always local."""
    allow_code_execution: bool = False
    """Run programs that the model wrote, for tasks such as humaneval_instruct that are refused otherwise; each runs
    with limits, in an empty folder, without a network."""
    allow_network: bool = False
    """Run them also where the system cannot take the network, files and processes out of their reach."""
    run: str = ""
    """Run folder for rows/ and samples/: a name below runs/, or a path with a slash; empty: the export's own run
    folder, else runs/<name of the checkpoint folder>."""
    label: str = ""
    """Name of the model in rows, tables and file names; empty: taken from the checkpoint's name."""
    grid: bool = False
    """Run reuse_k 1, 2, 3 x subset first, middle, last; only what is missing."""
    axes: AxesConfig = field(default_factory=AxesConfig)
    """More to vary, with or without grid: --axes.threshold [0.8,0.9] --axes.batch_size [1,32] is four cells."""
    repeat: int = 1
    """Times that each cell is measured, as rows of their own: all cells once, then all again, 1 or more."""
    trace: int = 0
    """First problems of each cell that are decoded again, one by one, with a trace in <run folder>/traces/, also where
    the cell has a row already; 0: none. Look at them with python -m fastdllm.demo view."""
    status: bool = False
    """Only print which rows are there."""
    dry_run: bool = False
    """Only print what would run."""
    force: str = field(default="", metadata={"bare": "all"})
    """Run again what has a row already: all, or cells such as k2_middle or k1_first,k3_last."""
    show_mixed_revisions: bool = False
    """Show rows of different code revisions in one table."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: bfloat16, float16 or float32, by the device."""
    seed: int = 0
    """Seed of sampling above temperature 0."""

    def __post_init__(self):
        for name, least in LEAST.items():
            _check_least(name, [getattr(self, name)], least)
        if self.grid and (self.axes.reuse_k or self.axes.subset or self.mode == "ar"):
            raise ValueError("grid varies reuse_k and subset itself and is diffusion; leave those and mode ar out.")
        self._check_one_source()
        self._check_threshold()
        self._check_reuse()
        self._check_trace()
        if self.engine == "transformers" and self.adapter:
            raise ValueError(
                f"engine transformers knows no gated adapter, got adapter {self.adapter}; leave it out, or take engine "
                "fastdllm."
            )
        if self.engine == "transformers" and (self.mode == "diffusion" or self.decode.temperature > 0):
            raise ValueError(
                "engine transformers decodes greedily and in mode ar only, got mode "
                f"{self.mode}, temperature {self.decode.temperature:g}; use engine fastdllm."
            )

    def _check_one_source(self) -> None:
        """Raise ValueError for what is both given and varied."""
        if self.axes.checkpoint and (self.checkpoint or self.label):
            raise ValueError(
                "axes.checkpoint names the checkpoints, and their own names are the labels; leave checkpoint "
                "and label out."
            )
        if len(self.axes.checkpoint) > 1 and self.adapter:
            raise ValueError(
                f"adapter {self.adapter} belongs to one checkpoint, and axes.checkpoint has "
                f"{len(self.axes.checkpoint)}; name that one with checkpoint."
            )
        twice = sorted(key for key in given(self) if key.removeprefix("decode.") in varied(self))
        if twice:
            raise ValueError(f"{', '.join(twice)}: given, and varied by grid or axes too; leave one out.")

    def _check_threshold(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], or 0 for the export's, got {self.threshold}; try 0.9.")
        policies = self._values("policy")
        if self.threshold and "threshold" not in policies:
            raise ValueError(
                f"threshold {self.threshold} does nothing with decode.policy {', '.join(policies)}; leave one out."
            )
        if self.threshold and self.decode.threshold not in (DEFAULT_THRESHOLD, self.threshold):
            raise ValueError(
                f"threshold {self.threshold} contradicts decode.threshold {self.decode.threshold}; give one."
            )

    def _check_reuse(self) -> None:
        """Raise ValueError for reuse that cannot be; combinations of varied values are checked as cells."""
        is_on = self.schedule == "adaptive" or max(self._values("reuse_k")) > 1
        if (is_on or "needed" in self._values("active_rows")) and True not in self._values("use_block_cache"):
            raise ValueError(
                "reuse_k above 1 (and grid, schedule adaptive, active_rows needed) needs decode.use_block_cache true: "
                "without the sub-block cache every denoising step is a full pass and nothing is reused; leave "
                "decode.use_block_cache out."
            )
        if self.mode != "ar" and not is_on and (self.subset, self.reuse_mode) != UNUSED_REUSE:
            raise ValueError(
                f"subset {self.subset} and reuse_mode {self.reuse_mode} have no effect with reuse_k 1; add --reuse_k 2."
            )
        if not varied(self):
            ReuseConfig(
                reuse_k=self.reuse_k,
                schedule=self.schedule,
                budget=self.budget,
                subset=self.subset,
                reuse_mode=self.reuse_mode,
                active_rows=self.active_rows,
            )

    def _check_trace(self) -> None:
        if self.trace and (self.status or self.dry_run or self.engine == "transformers"):
            raise ValueError(
                f"trace {self.trace} needs a run of engine fastdllm; leave trace out, or status, dry_run and engine "
                "transformers."
            )
        if self.trace > self.limit > 0:
            raise ValueError(
                f"trace must be at most limit ({self.limit}), got {self.trace}; raise limit, or lower trace."
            )

    def _values(self, name: str) -> list[Any]:
        """Return the values that a setting takes: those of its axis, else its own."""
        own = flatten(self)
        return varied(self).get(name) or [own[name] if name in own else own[f"decode.{name}"]]


def varied(config: EvaluateConfig) -> dict[str, list[Any]]:
    """Return the values of each setting that is varied within a checkpoint, by its name."""
    axes = {name: values for name, values in vars(config.axes).items() if values and name != "checkpoint"}
    return axes | (GRID if config.grid else {})


def given(config: EvaluateConfig) -> set[str]:
    """Return the dotted names of the options outside `axes` that are not at their default."""
    usual = {f.name: f.default for f in fields(config)} | flatten({"decode": to_dict(DecodeConfig())})
    return {key for key, value in flatten(config).items() if key in usual and value != usual[key]}
