"""Show what training sees: the first samples with their documents, blocks, labels and both noised views."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from torch import Tensor

from fastdllm.checkpoint import open_checkpoint
from fastdllm.cli import run
from fastdllm.data.datamodule import AdaptDataModule, DataConfig, TrainingSamples
from fastdllm.data.packing import Objective
from fastdllm.draft import NO_ANCHOR, DraftConfig
from fastdllm.objective import ObjectiveConfig, complementary_views
from fastdllm.training.config import TrainConfig, learnt

STYLES = {"prompt": "dim", "response": "green", "masked": "black on red", "padding": "blue", "block": "yellow"}
ROWS_READ = 2_000
MASKED, PADDING, NEWLINE, BLOCK = "▒", "·", "⏎\n", "│"


@dataclass(frozen=True, kw_only=True)
class InspectConfig(TrainConfig):
    """Show the first samples of a training run."""

    rows: int = 2
    """Samples shown, 1 or more."""

    def __post_init__(self):
        super().__post_init__()
        if self.rows < 1:
            raise ValueError(f"rows must be 1 or more, got {self.rows}.")


def main(arguments: list[str]) -> None:
    """Run the command line: a training config, and `--rows`."""
    run(InspectConfig, _inspect, arguments)


def _inspect(config: InspectConfig) -> None:
    data = config.data
    if data.limit == 0 or data.limit > ROWS_READ:
        print(f"reading the first {ROWS_READ:,} rows only; training draws its samples from all")
        data = dataclasses.replace(data, limit=ROWS_READ)
    source = open_checkpoint(config.checkpoint)  # reads the tokenizer, no weights
    inspect_data(data, learnt(config), config.seed, source.tokenizer, source.mask_token_id, rows=config.rows)


def inspect_data(
    data: DataConfig,
    objective: Objective,
    seed: int,
    tokenizer: Any,
    mask_token_id: int,
    *,
    rows: int = 2,
    console: Console | None = None,
) -> None:
    """Print the first `rows` samples of a run, preparing its data if that was not done before."""
    console = console or Console(highlight=False)
    module = AdaptDataModule(
        data, tokenizer, mask_token_id=mask_token_id, objective=objective, seed=seed, micro_batch_size=1
    )
    module.prepare_data()
    samples = TrainingSamples(module.training, seed, samples_per_step=1)
    console.print(_legend())
    for index in range(rows):
        _print_sample(console, samples[index], objective, tokenizer, mask_token_id)


def _legend() -> Text:
    legend = Text("prompt ", STYLES["prompt"])
    legend.append("response, supervised ", STYLES["response"])
    legend.append(f"{MASKED} masked", STYLES["masked"])
    legend.append(f" {PADDING} padding ", STYLES["padding"])
    return legend.append(f"{BLOCK} start of a block, with its noise level in a view", STYLES["block"])


def _print_sample(
    console: Console, sample: dict[str, Tensor], objective: Objective, tokenizer: Any, mask_token_id: int
) -> None:
    if isinstance(objective, DraftConfig):
        views, levels, marks = {"clean": None}, [[]], set((sample["anchor"] + 1).tolist())
        num_drawn = int((sample["anchor"] != NO_ANCHOR).sum())
        console.print(
            f"{num_drawn} of {len(sample['anchor'])} windows of {objective.window} mask rows drawn; {BLOCK} marks "
            "their first places"
        )
    else:
        views, levels = _views(sample, objective, mask_token_id)
        marks = set(range(0, len(sample["tokens"]), objective.block_size))
    documents = sample["document"]
    for (name, view), level in zip(views.items(), levels, strict=False):
        for document in range(1, int(documents.max()) + 1):
            columns = (documents == document).nonzero()[:, 0].tolist()
            title = f"sample {int(sample['index'])} · document {document} · {name} · tokens {columns[0]}..{columns[-1]}"
            console.print(Rule(title, align="left"))
            noise_levels = {place * objective.block_size: value for place, value in enumerate(level)}
            console.print(_paint(sample, columns, view, marks, noise_levels, tokenizer, mask_token_id))
    unused = int((documents == 0).sum())
    console.print(f"{int(sample['num_tokens'])} document tokens; the last {unused} tokens of the sample are unused")


def _views(
    sample: dict[str, Tensor], objective: ObjectiveConfig, mask_token_id: int
) -> tuple[dict[str, Tensor | None], list[list[float]]]:
    """Return what is masked in the clean half and both views, and the noise levels of their blocks."""
    batch = {name: value[None] for name, value in sample.items()}
    _, is_masked = complementary_views(batch["tokens"], batch["is_response"], batch["is_masked_first"], mask_token_id)
    levels = [[], sample["noise_level"].tolist(), (1 - sample["noise_level"]).tolist()]
    views = {"clean": None, "view a": is_masked[0].chunk(2)[0], "view b": is_masked[0].chunk(2)[1]}
    if objective.kind == "autoregressive":
        views = {"clean": None}
    return views, levels


def _paint(
    sample: dict[str, Tensor],
    columns: list[int],
    is_masked: Tensor | None,
    marks: set[int],
    noise_levels: dict[int, float],
    tokenizer: Any,
    mask_token_id: int,
) -> Text:
    text = Text()
    for column in columns:
        if column in marks:
            text.append(f"{BLOCK}{noise_levels[column]:.2f} " if noise_levels else BLOCK, STYLES["block"])
        token = int(sample["tokens"][column])
        if is_masked is not None and is_masked[column]:
            text.append(MASKED, STYLES["masked"])
        elif token == mask_token_id:
            text.append(PADDING, STYLES["padding"])
        else:
            label = "response" if sample["is_response"][column] else "prompt"
            text.append(tokenizer.decode([token]).replace("\n", NEWLINE), STYLES[label])
    return text
