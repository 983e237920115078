"""The lm-eval adapter: our engine under the published model name and arguments, and lm-eval's tasks for `evaluate.py`.

Shell: `python -m fastdllm.evaluation.harness run --model fast_dllm_v2 --model_args model_path=... --tasks gsm8k
--num_fewshot 0 --apply_chat_template --fewshot_as_multiturn` is lm-eval's own command line with our model registered.
"""

import difflib
import functools
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from fastdllm.checkpoint import Checkpoint, load_checkpoint
from fastdllm.decoding.engine import DecodeConfig, Engine
from fastdllm.decoding.policies import PolicyName
from fastdllm.decoding.reuse import ActiveRows, ReuseConfig, ReuseMode, Schedule
from fastdllm.decoding.rows import Completion, Request
from fastdllm.evaluation.baseline import TransformersEngine
from fastdllm.evaluation.likelihood import autoregressive_scores, masked_scores
from fastdllm.evaluation.scoring import TaskRun, collect
from fastdllm.runtime import get_optimal_dtype, pick_device

PUBLISHED_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{{}}."
PUBLISHED_EDITS = {"gsm8k": "Answer:", "minerva_math": "Solution:"}  # task name prefix -> text that is replaced
GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
LOCAL_TASKS = Path("data/tiny/tasks")
OFFLINE_DATA = {"gsm8k": "openai/gsm8k", "minerva_math": "EleutherAI/hendrycks_math"}
OFFLINE_DATA |= {"minerva_math500": "HuggingFaceH4/MATH-500", "ifeval": "google/IFEval"}
LM_EVAL_DEFAULTS = {"batch_size": 1, "device": "cuda:0"}  # what its command line passes when nothing is given


@dataclass(frozen=True, kw_only=True)
class HarnessArguments:
    """The model arguments, under their published names and with their published defaults, then ours."""

    model_path: str = "Efficient-Large-Model/Fast_dLLM_v2_7B"
    """Hub id, HF folder or .gguf file."""
    device: str = "auto"
    """auto (cuda, the published default, where there is one), cpu, cuda or cuda:N."""
    show_speed: bool = False
    """Print tokens, seconds and tokens/s after each set of requests."""
    max_new_tokens: int = 2048
    """Most new tokens of an answer; a task's own limit holds when it is lower."""
    batch_size: int = 32
    """Problems decoded together."""
    mask_id: int = 0
    """Mask token id; 0: the checkpoint's (151665 in published ones). Another id than the checkpoint's is an error."""
    use_block_cache: bool = False
    """Switches the sub-block cache."""
    small_block_size: int = 8
    """Sub-block size in tokens."""
    bd_size: int = 0
    """Block size; 0: the checkpoint's (32 in published ones). Another size than the checkpoint's is an error."""
    threshold: float = 0.9
    """Confidence in (0, 1] above which a proposal is accepted."""
    policy: PolicyName = "threshold"
    """Which proposals are accepted."""
    policy_parameter: float = 0.0
    """The number of policies other than threshold; 0: the policy's default."""
    fuse_append: bool = False
    """Compute the next block's first step together with the append."""
    reuse_k: int = 1
    """Refresh every k-th denoising step; 1: no reuse."""
    layer_subset: str = "first"
    """Layers that may reuse: first, middle, last, or indices joined by + such as 4+5+6."""
    experiment_name: str = ""
    """A name that lm-eval writes beside its results."""
    reuse_mode: ReuseMode = "output"
    """What stands in for a reused layer."""
    schedule: Schedule = "fixed"
    """fixed: refreshes by reuse_k; adaptive: by how much has changed, against budget."""
    budget: float = 0.0
    """Schedule adaptive: the summed relative change up to which layers are reused, 0 or more."""
    active_rows: ActiveRows = "all"
    """Rows that a sub-block step computes; needed: only those that can change (not with reused layers)."""
    mode: Literal["auto", "ar", "diffusion"] = "auto"
    """auto: diffusion for adapted checkpoints, ar for others."""
    engine: Literal["fastdllm", "transformers"] = "fastdllm"
    """transformers: its own generation loop, in mode ar only."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 0.95
    """Nucleus for temperature above 0."""
    prompt: Literal["published", "lm_eval"] = "published"
    """published: the answer cue of gsm8k and minerva_math is replaced by an instruction (method.md 4)."""
    dtype: str = "auto"
    """auto (by device), float32, float16 or bfloat16."""
    seed: int = 0
    """Seed of sampling; problem i draws from seed + i."""

    @property
    def decode(self) -> DecodeConfig:
        """How blocks are unmasked."""
        return DecodeConfig(
            sub_block_size=self.small_block_size,
            policy=self.policy,
            threshold=self.threshold,
            policy_parameter=self.policy_parameter,
            fuse_append=self.fuse_append,
            use_block_cache=self.use_block_cache,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    @property
    def reuse(self) -> ReuseConfig:
        """What is reused, and when."""
        return ReuseConfig(
            reuse_k=self.reuse_k,
            schedule=self.schedule,
            budget=self.budget,
            subset=self.layer_subset.replace("+", ","),
            reuse_mode=self.reuse_mode,
            active_rows=self.active_rows,
        )


@register_model("fast_dllm_v2")
class FastDLLMv2(TemplateLM):
    """Owns a checkpoint and answers lm-eval's requests with our engine; keeps what was counted for each problem.

    Log-likelihood in mode diffusion is the published single-token form: the first target token is masked, later ones
    stay visible, and the score is the log-probability of that one token; so only single-token continuations (letters)
    are meaningful, and `is_greedy` is always False. In mode ar it is the exact one, over all target tokens.
    """

    def __init__(self, checkpoint: Checkpoint | None = None, **arguments: Any):
        super().__init__()
        self.arguments = parse_arguments(arguments)
        self.decoding, self.reuse = self.arguments.decode, self.arguments.reuse  # refused before the model is loaded
        self._device = pick_device(self.arguments.device)
        self.dtype = pick_dtype(self.arguments.dtype, self._device)
        self.checkpoint = checkpoint or load_checkpoint(
            self.arguments.model_path, dtype=self.dtype, device=self._device
        )
        self.mode = resolve_mode(self.arguments.mode, self.checkpoint)
        self.tokenizer = self.checkpoint.tokenizer
        self.model = self.checkpoint.model()
        self._check_checkpoint()
        self.completions: dict[tuple[str, int], Completion] = {}
        """What was counted, by (task name, problem number)."""
        self.seconds, self.decode_seconds = 0.0, 0.0
        """Wall time inside the engine, warm-up excluded; 0 for decode_seconds where the engine does not tell."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "FastDLLMv2":
        """Build from lm-eval's command line: its --batch_size and --device win, unless they are its own defaults."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        chosen = {name: value for name, value in given.items() if str(value) != str(LM_EVAL_DEFAULTS.get(name))}
        return cls(**{**arg_dict, **chosen})

    def _check_checkpoint(self) -> None:
        arguments, model = self.arguments, self.model
        if arguments.bd_size not in (0, model.block_size):
            raise ValueError(
                f"bd_size must be the block size that the checkpoint was adapted with ({model.block_size}), got "
                f"{arguments.bd_size}; leave bd_size out."
            )
        if arguments.mask_id not in (0, model.mask_token_id):
            raise ValueError(
                f"mask_id must be the checkpoint's mask token ({model.mask_token_id}), got {arguments.mask_id}; leave "
                "mask_id out."
            )
        if arguments.engine == "transformers" and self.mode != "ar":
            raise ValueError("engine transformers decodes in mode ar only, got mode diffusion; use engine fastdllm.")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.checkpoint.source.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        return {"experiment_name": self.arguments.experiment_name, "checkpoint_hash": self.checkpoint.digest}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text of each answer, without its stop string; what was counted goes into `completions`."""
        engine = self._engine()
        queue = [self._request(number, instance) for number, instance in enumerate(requests)]
        if self._device.type == "cuda":  # allocator, kernels and libraries are set up outside the timing
            list(engine.run([Request(prompt=queue[0].prompt, max_new_tokens=self.model.block_size)]))
            engine.free()
            engine = self._engine()
        answers: list[str] = [""] * len(requests)
        for completion in tqdm(engine.run(queue), total=len(queue), desc="problems", disable=disable_tqdm or None):
            instance = requests[completion.index]
            answers[completion.index] = completion.text
            if (instance.task_name, instance.doc_id) in self.completions:
                raise ValueError(f"{instance.task_name} asks for each problem several times (repeats), set repeats: 1.")
            self.completions[instance.task_name, instance.doc_id] = completion
            self.cache_hook.add_partial("generate_until", instance.args, completion.text)
        self.seconds += engine.seconds
        self.decode_seconds += engine.decode_seconds or 0.0
        engine.free()
        if self.arguments.show_speed:
            tokens = sum(completion.counted_tokens for completion in self.completions.values())
            print(f"{tokens} tokens in {self.seconds:.1f} s: {tokens / self.seconds:.1f} tokens/s")
        return answers

    def _engine(self) -> Engine | TransformersEngine:
        arguments = self.arguments
        if arguments.engine == "transformers":
            return TransformersEngine(self.model, self.tokenizer, arguments.batch_size)
        return Engine(
            self.model,
            self.tokenizer,
            mode=self.mode,
            decode=self.decoding,
            reuse=self.reuse,
            batch_size=arguments.batch_size,
        )

    def _request(self, number: int, instance: Instance) -> Request:
        prompt, options = instance.args
        self._check_generation(instance.task_name, options)
        until = options.get("until") or []
        limit = min(self.arguments.max_new_tokens, options.get("max_gen_toks", self.arguments.max_new_tokens))
        return Request(
            prompt=self.tok_encode(self.final_prompt(instance.task_name, prompt)),
            max_new_tokens=int(limit),
            stop_strings=tuple([until] if isinstance(until, str) else until),
            seed=self.arguments.seed + number,
        )

    def final_prompt(self, task: str, prompt: str) -> str:
        """Return the text that the model reads for lm-eval's prompt: edited in the published form, else as it is."""
        return published_prompt(task, prompt) if self.arguments.prompt == "published" else prompt

    def _check_generation(self, task: str, options: dict[str, Any]) -> None:
        unknown = sorted(set(options) - set(GENERATION_KEYS))
        if unknown:
            raise ValueError(f"{task} asks for {', '.join(unknown)}; known are {', '.join(GENERATION_KEYS)}.")
        if options.get("do_sample") and self.arguments.temperature == 0:
            raise ValueError(
                f"{task} samples (temperature {options.get('temperature')}) but the decoder is greedy; set the model's "
                "temperature, or do_sample=False in gen_kwargs."
            )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        reuse = self.reuse
        if reuse.is_on or reuse.is_trimmed:
            raise ValueError(
                "a log-likelihood task makes no denoising step, so it cannot exercise reuse_k "
                f"{reuse.reuse_k}, schedule {reuse.schedule}, active_rows {reuse.active_rows}; leave them out."
            )
        scores, started, size = [], time.perf_counter(), self.arguments.batch_size
        for start in tqdm(range(0, len(requests), size), desc="log-likelihoods", disable=None):
            pairs = [(context, target) for _, context, target in requests[start : start + size]]
            if self.mode == "ar":
                scores += autoregressive_scores(self.model, pairs)
            else:
                scores += masked_scores(self.model, pairs, self.eot_token_id)
        self.seconds += time.perf_counter() - started
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise ValueError("fast_dllm_v2 has no rolling log-likelihood (nor has the published one); choose another task.")


def parse_arguments(arguments: dict[str, Any]) -> HarnessArguments:
    """Return the typed arguments. Raises ValueError for an unknown name, with the nearest known one."""
    known = [field.name for field in fields(HarnessArguments)]
    for name in arguments:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}."
            raise ValueError(f"unknown model argument {name}; {hint}")
    if arguments.get("layer_subset", "") is None:  # the seed study's spelling of its default
        arguments = {**arguments, "layer_subset": "first"}
    typed = {name: _typed(name, value) for name, value in arguments.items()}
    return HarnessArguments(**typed)


def _typed(name: str, value: Any) -> Any:
    """Return a model argument in the type of its field. Raises ValueError for a value that it cannot be."""
    kind = get_type_hints(HarnessArguments)[name]
    choices = get_args(kind) or ((True, False) if kind is bool else ())
    try:
        value = value if choices else kind(value)
    except ValueError:
        raise ValueError(f"model argument {name} must be a {kind.__name__}, got {value!r}.") from None
    if choices and value not in choices:
        raise ValueError(f"model argument {name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
    return value


def resolve_mode(mode: str, checkpoint: Checkpoint) -> str:
    """Return "ar" or "diffusion". Raises ValueError for diffusion on a checkpoint that was never adapted."""
    is_adapted = checkpoint.adaptation is not None
    if mode == "diffusion" and not is_adapted:
        raise ValueError(
            f"mode diffusion needs an adapted checkpoint, got the autoregressive {checkpoint.source}; adapt it with "
            "train.py, or use mode ar."
        )
    return ("diffusion" if is_adapted else "ar") if mode == "auto" else mode


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is the device's best. Raises ValueError for an unknown name."""
    choices = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name != "auto" and name not in choices:
        raise ValueError(f"dtype must be auto, {', '.join(choices)}, got {name!r}.")
    return get_optimal_dtype(device)[0] if name == "auto" else choices[name]


def published_prompt(task: str, prompt: str) -> str:
    """Return the prompt with the task's answer cue replaced as in the published harness (method.md 4)."""
    for prefix, cue in PUBLISHED_EDITS.items():
        if task.startswith(prefix):
            return prompt.replace(cue, PUBLISHED_INSTRUCTION)
    return prompt


def run_task(lm: FastDLLMv2, task: str, *, limit: int = 0, offline: str = "") -> TaskRun:
    """Run an lm-eval task (or group) on `lm` with its chat template and return the problems, scored.

    Args:
        lm: its `prompt` decides the examples: published is 0-shot for gsm8k and minerva_math; lm_eval, and other tasks,
            take the task's own number.
        limit: problems of each task; 0: all.
        offline: folder with data laid out by hub id; "": the hub.
    """
    is_published = lm.arguments.prompt == "published" and any(task.startswith(prefix) for prefix in PUBLISHED_EDITS)
    manager, wanted = find_task(task, offline)
    results = simple_evaluate(
        model=lm,
        tasks=[wanted],
        num_fewshot=0 if is_published else None,
        limit=limit or None,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        task_manager=manager,
    )
    return collect(task, results["samples"], lm.final_prompt)


def find_task(task: str, offline: str = "") -> tuple[TaskManager, str | dict[str, Any]]:
    """Return a manager and what to ask it for: the project's own task, lm-eval's, or lm-eval's with local data.

    Raises:
        ValueError: no such task, or `offline` knows no folder for its data. FileNotFoundError: the folder is not there.
    """
    local = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False) if LOCAL_TASKS.is_dir() else None
    own = local.all_tasks if local is not None else []
    if local is not None and task in own:
        return local, task
    data = offline_folder(task, offline) if offline else None
    manager = _stock_tasks()
    if task not in manager.all_tasks:
        nearest = difflib.get_close_matches(task, [*own, *manager.all_tasks], n=1)
        listing = "`python -m fastdllm.evaluation.harness ls tasks` lists them."
        raise ValueError(f"unknown task {task!r}; {f'did you mean {nearest[0]}?' if nearest else listing}")
    if data is None:
        return manager, task
    known = manager.all_subtasks
    members = [task] if task in known else [name for name in known if name.startswith(f"{task}_")]
    return manager, {"group": f"{task}_offline", "task": [{"task": name, "dataset_path": data} for name in members]}


@functools.cache
def _stock_tasks() -> TaskManager:
    return TaskManager()  # indexes 14,000 files: many seconds, so once per process


def offline_folder(task: str, offline: str) -> str:
    """Return the folder below `offline` with the data of a stock task.

    Raises:
        ValueError: the task's data has no known folder. FileNotFoundError: it is not there.
    """
    family = max((name for name in OFFLINE_DATA if task.startswith(name)), key=len, default=None)
    if family is None:
        raise ValueError(f"offline knows the data folders of {', '.join(OFFLINE_DATA)}, got task {task!r}.")
    data = Path(offline, OFFLINE_DATA[family]).resolve()
    if not data.is_dir():
        raise FileNotFoundError(f"offline: task {task} needs the folder {data}, which is not there; see --help.")
    return str(data)


if __name__ == "__main__":
    cli_evaluate()
