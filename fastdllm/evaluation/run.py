"""`evaluate(config)`: one measurement or a grid of them on one checkpoint, one row for each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastdllm.checkpoint import Checkpoint, open_checkpoint
from fastdllm.cli import flatten, to_dict
from fastdllm.decoding.engine import DecodeConfig
from fastdllm.decoding.reuse import ReuseMode, layer_subset
from fastdllm.evaluation import harness, sweep
from fastdllm.evaluation.results import (
    Counts,
    Row,
    make_row,
    print_table,
    ratios,
    read_row,
    read_rows,
    write_row,
    write_samples,
)
from fastdllm.evaluation.scoring import TaskRun, score
from fastdllm.evaluation.store import SampleStore, digest
from fastdllm.runtime import code_revision, device_name, library_versions, pick_device

DEFAULT_THRESHOLD = 0.9
NAMED_SUBSETS = ("first", "middle", "last")
UNUSED_REUSE = ("first", "output")
DIFFUSION_OPTIONS = ("reuse_k", "subset", "reuse_mode", "grid", "threshold")
DIFFUSION_OPTIONS += tuple(f"decode.{name}" for name in ("policy", "threshold", "policy_parameter", "sub_block_size"))
DIFFUSION_OPTIONS += ("decode.use_block_cache", "decode.fuse_append")
GENERATION_OPTIONS = (*DIFFUSION_OPTIONS, "decode.temperature", "decode.top_p", "engine", "max_new_tokens")
LIKELIHOOD_UNUSED = (*sweep.DIFFUSION_ONLY, "temperature", "top_p", "seed", "engine", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, how it is decoded, and where the rows go."""

    checkpoint: str = ""
    """Hub id, published checkpoint, export, AR folder or .gguf file; empty: the newest export under runs/."""
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
    with its own examples. Both use the chat template."""
    offline: str = ""
    """Folder with evaluation data laid out by hub id (DIR/openai/gsm8k); empty: the hub. data/tiny is always local."""
    run: str = ""
    """Run folder for rows/ and samples/: a name below runs/, or a path with a slash; empty: the export's own run
    folder, else runs/<name of the checkpoint folder>."""
    label: str = ""
    """Name of the model in rows, tables and file names; empty: taken from the checkpoint's name."""
    grid: bool = False
    """Run reuse_k 1, 2, 3 x subset first, middle, last; only what is missing."""
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
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], or 0 for the export's, got {self.threshold}; try 0.9.")
        if self.threshold and self.decode.policy != "threshold":
            raise ValueError(
                f"threshold {self.threshold} does nothing with decode.policy {self.decode.policy}; leave one out."
            )
        if self.threshold and self.decode.threshold not in (DEFAULT_THRESHOLD, self.threshold):
            raise ValueError(
                f"threshold {self.threshold} contradicts decode.threshold {self.decode.threshold}; give one."
            )
        for name, least in (("reuse_k", 1), ("batch_size", 1), ("max_new_tokens", 0), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        if self.grid and (self.reuse_k != 1 or self.subset != "first" or self.mode == "ar"):
            raise ValueError(
                "grid sets reuse_k and subset itself and is diffusion; leave those and mode ar out, or grid."
            )
        if (self.grid or self.reuse_k > 1) and not self.decode.use_block_cache:
            raise ValueError(
                "reuse_k above 1 (and grid) needs decode.use_block_cache true: without the sub-block cache every "
                "denoising step is a full pass and nothing is reused; leave decode.use_block_cache out."
            )
        if self.mode != "ar" and not self.grid and self.reuse_k == 1 and (self.subset, self.reuse_mode) != UNUSED_REUSE:
            raise ValueError(
                f"subset {self.subset} and reuse_mode {self.reuse_mode} have no effect with reuse_k 1; add --reuse_k 2."
            )
        if self.engine == "transformers" and (self.mode == "diffusion" or self.decode.temperature > 0):
            raise ValueError(
                "engine transformers decodes greedily and in mode ar only, got mode "
                f"{self.mode}, temperature {self.decode.temperature:g}; use engine fastdllm."
            )


def evaluate(config: EvaluateConfig) -> list[Row]:
    """Measure what has no valid row yet, print the table of the run folder, and return the rows of this config.

    Raises:
        ValueError, FileNotFoundError: what cannot be evaluated, with the way out.
    """
    rows = run_missing(config)
    if rows and not (config.status or config.dry_run):
        print_table(rows, show_mixed_revisions=True)
        folder = run_folder(config.run, source_of(config)) / "rows"
        if len(read_rows(folder)) > len(rows):
            show_rows(folder, config.show_mixed_revisions)
    return rows


def run_missing(config: EvaluateConfig) -> list[Row]:
    """Measure what has no valid row yet and return its rows, or only say what is there (status, dry_run)."""
    source = source_of(config)
    device = pick_device(config.device)
    dtype = harness.pick_dtype(config.dtype, device)
    checkpoint = open_checkpoint(source, dtype=dtype, device=device)  # asking what is there reads no weights
    settings = resolve_settings(config, checkpoint)
    folder = run_folder(config.run, source)
    if not config.checkpoint:
        print(f"checkpoint: {source} (the newest export under runs/), task {settings['task']}")
    cells = sweep.grid_cells(settings) if config.grid else [sweep.make_cell(settings)]
    if config.status:
        print("\n".join(sweep.status_lines(cells, folder / "rows", checkpoint.digest)))
        return read_cells(cells, folder)
    to_run = sweep.cells_to_run(cells, folder / "rows", checkpoint.digest, config.force)
    if config.dry_run:
        print("\n".join(f"would run {cell.name} ({reason})" for cell, reason in to_run) or "nothing to run")
        return read_cells(cells, folder)
    print(f"{len(to_run)} of {len(cells)} measurements to run on {device_name(device)} in {dtype}")
    revision = code_revision()  # what runs from here on, whatever is committed meanwhile
    sweep.run_cells(to_run, folder / "rows", lambda cell: measure(cell, checkpoint, config, folder, revision))
    return read_cells(cells, folder)


def show_rows(folder: Path, show_mixed_revisions: bool = False) -> None:
    """Print the table of all rows in `folder`, or why they do not belong into one table."""
    rows = read_rows(folder)
    try:
        print_table(rows, show_mixed_revisions)
    except ValueError as error:
        print(f"no table of {folder}: {error}")


def read_cells(cells: list[sweep.Cell], folder: Path) -> list[Row]:
    """Return the rows that are there for these cells."""
    rows = [read_row(folder / "rows" / f"{cell.name}.json") for cell in cells]
    return [row for row in rows if row is not None]


def source_of(config: EvaluateConfig) -> str:
    """Return the checkpoint to evaluate: the one named, else the newest export under runs/."""
    return config.checkpoint or str(newest_export())


def newest_export(runs: str | Path = "runs") -> Path:
    """Return the export folder under `runs` whose config was written last. Raises FileNotFoundError: there is none."""
    configs = sorted(Path(runs).glob("*/export/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise FileNotFoundError(
            f"no export under {runs}/; name one with --checkpoint (data/tiny-adapted is bundled), or make one: "
            "python train.py --config configs/demo.yaml."
        )
    return configs[-1].parent


def run_folder(run: str, source: str) -> Path:
    """Return where rows/ and samples/ go: `run` (a name or path), the run that exported `source`, or runs/<name>."""
    if run:
        return Path(run) if "/" in run else Path("runs") / run
    path = Path(source)
    return path.parent if _is_run_export(path) else Path("runs") / default_label(source)


def default_label(source: str) -> str:
    """Return a short name for a checkpoint: the run of an export, else the last part of its path or hub id."""
    path = Path(source)
    if _is_run_export(path):
        return path.resolve().parent.name
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name


def _is_run_export(path: Path) -> bool:
    return path.exists() and path.resolve().name == "export"


def resolve_settings(config: EvaluateConfig, checkpoint: Checkpoint) -> sweep.Settings:
    """Return everything that decides a measurement, with what the export remembers filled in.

    Raises:
        ValueError: no task, diffusion on an autoregressive checkpoint, or options that contradict each other.
    """
    adaptation, default = checkpoint.adaptation, DecodeConfig()
    task = config.task or (adaptation.task if adaptation else "")
    if not task:
        raise ValueError(
            f"{checkpoint.source} remembers no task; name one, such as --task gsm8k or --task tiny_problems."
        )
    mode = "ar" if config.engine == "transformers" else harness.resolve_mode(config.mode, checkpoint)
    if mode == "ar":
        _check_autoregressive(config, checkpoint.source)
    decode = to_dict(config.decode) | {"threshold": config.threshold or config.decode.threshold}
    if adaptation and not config.threshold and config.decode.threshold == default.threshold:
        decode["threshold"] = adaptation.threshold
    if adaptation and config.decode.sub_block_size == default.sub_block_size:
        decode["sub_block_size"] = adaptation.sub_block_size
    is_threshold = config.decode.policy == "threshold"
    decode["policy_parameter"] = None if is_threshold else float(config.decode.parameter)
    decode["threshold"] = decode["threshold"] if is_threshold else None
    asked = {name: getattr(config, name) for name in sweep.ASKED}
    return (
        asked
        | decode
        | {
            "label": config.label or default_label(checkpoint.source),
            "task": task,
            "mode": mode,
            "device": pick_device(config.device).type,
            "dtype": str(harness.pick_dtype(config.dtype, pick_device(config.device))).removeprefix("torch."),
            "subset": canonical_subset(config.subset, checkpoint.config.num_hidden_layers),
        }
    )


def _check_autoregressive(config: EvaluateConfig, source: str) -> None:
    """Raise ValueError for options that mode ar would silently ignore."""
    inert = _changed(config, DIFFUSION_OPTIONS)
    if inert:
        raise ValueError(
            f"{', '.join(inert)}: nothing in mode ar, which {source} is decoded in; leave out, or adapt it."
        )


def _check_likelihood(config: EvaluateConfig) -> None:
    """Raise ValueError for options that a log-likelihood task would silently ignore."""
    inert = _changed(config, GENERATION_OPTIONS)
    if inert:
        raise ValueError(harness.unused_by_likelihood(inert))


def _changed(config: EvaluateConfig, names: Sequence[str]) -> list[str]:
    """Return the options that differ from their defaults, with their values."""
    asked, usual = flatten(config), flatten(EvaluateConfig())
    return [f"{name} {asked[name]}" for name in names if asked[name] != usual[name]]


def canonical_subset(subset: str, num_layers: int) -> str:
    """Return the name of a subset: first, middle or last also where it is given as a list, else sorted indices."""
    layers = layer_subset(num_layers, subset)
    names = [name for name in NAMED_SUBSETS if layer_subset(num_layers, name) == layers]
    return subset if subset in NAMED_SUBSETS else names[0] if names else ",".join(map(str, layers))


def measure(
    cell: sweep.Cell, checkpoint: Checkpoint, config: EvaluateConfig, folder: Path, revision: tuple[str, bool]
) -> Row:
    """Run one cell, write its row and return it; the answers go into `<folder>/samples/<cell>.samples.jsonl`.

    Finished samples are kept in `<cell>.partial.jsonl` until the row is there: a cell that was killed goes on with the
    missing ones.
    """
    settings = cell.settings
    task = harness.load_task(settings["task"], config.offline)
    if task.is_likelihood:
        _check_likelihood(config)
        settings = settings | dict.fromkeys(LIKELIHOOD_UNUSED)
    model = harness.FastDLLMv2(checkpoint=checkpoint, **harness_arguments(settings))
    facts = {
        "checkpoint_hash": checkpoint.digest,
        "config_digest": cell.digest,
        "revision": revision[0],
        "is_dirty": revision[1],
        "device": device_name(model.device),
        "versions": library_versions(),
    }
    row_file = folder / "rows" / f"{cell.name}.json"
    replaced = digest(row_file.read_text()) if row_file.exists() else None  # a row forced again begins anew
    store = SampleStore(folder / "samples" / f"{cell.name}.partial.jsonl", {**facts, "replaced_row": replaced})
    model.keep(store)
    result = harness.run_task(model, task, limit=cell.settings["limit"])
    write_samples(folder / "samples" / f"{cell.name}.samples.jsonl", result.problems, model.completions)
    row = _make_row(cell, checkpoint, model, result, facts)
    write_row(folder / "rows", row)  # before the samples go, so that a kill in between costs nothing
    store.remove()
    return row


def _make_row(
    cell: sweep.Cell, checkpoint: Checkpoint, model: harness.FastDLLMv2, result: TaskRun, facts: dict[str, Any]
) -> Row:
    counts = count(model)
    does_not_apply = () if model.completions else sweep.GENERATION_ONLY  # log-likelihoods generate nothing
    return make_row(
        **{name: None if name in does_not_apply else cell.settings[name] for name in sweep.ROW_SETTINGS},
        **score([problem["correct"] for problem in result.problems], [problem["split"] for problem in result.problems]),
        **dataclasses.asdict(counts),
        **ratios(counts),
        **facts,
        cell=cell.name,
        model=checkpoint.portable_source,
        data_tokens=(checkpoint.adaptation.data_tokens or None) if checkpoint.adaptation else None,  # 0: not recorded
        metric=result.metric,
        metrics=result.metrics,
        likelihood=model.likelihood,
        dtype=str(model.model.dtype).removeprefix("torch."),
        config=cell.settings,
    )


def harness_arguments(settings: sweep.Settings) -> dict[str, Any]:
    """Return the model arguments, under their published names, that make this measurement."""
    names = {
        **{name: name for name in ("mode", "engine", "prompt", "device", "dtype", "seed", "batch_size")},
        **{name: name for name in ("threshold", "reuse_k", "reuse_mode", "use_block_cache", "temperature", "top_p")},
        **{name: name for name in ("policy", "policy_parameter", "fuse_append")},
        "sub_block_size": "small_block_size",
        "subset": "layer_subset",
    }
    arguments = {theirs: settings[ours] for ours, theirs in names.items() if settings[ours] is not None}
    if settings["max_new_tokens"]:
        arguments["max_new_tokens"] = settings["max_new_tokens"]
    if "layer_subset" in arguments:
        arguments["layer_subset"] = arguments["layer_subset"].replace(",", "+")
    return arguments


def count(model: harness.FastDLLMv2) -> Counts:
    """Return what the model's answers took; None for passes that its mode or the task does not have."""
    completions = list(model.completions.values())
    names = {field.name for field in dataclasses.fields(Counts)} - {"seconds", "decode_seconds"}
    if model.mode == "ar":
        names -= {"append_passes", "full_passes"}
    totals = {name: sum(getattr(done, name) for done in completions) for name in names} if completions else {}
    return Counts(**totals, seconds=model.seconds, decode_seconds=model.decode_seconds or None)
