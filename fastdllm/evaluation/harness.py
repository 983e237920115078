"""The lm-eval adapter: our engine under the published model name and arguments.

Shell: `python -m fastdllm.evaluation.harness run --model fast_dllm_v2 --model_args model_path=... --tasks gsm8k
--num_fewshot 0 --apply_chat_template --fewshot_as_multiturn` is lm-eval's own command line with our model registered.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task

from fastdllm.checkpoint import Checkpoint, load_checkpoint
from fastdllm.decoding.engine import Engine
from fastdllm.decoding.rows import Completion, Request
from fastdllm.evaluation.arguments import (
    READ_BY_LIKELIHOOD,
    HarnessArguments,
    parse_arguments,
    pick_dtype,
    resolve_mode,
    unused_by_likelihood,
)
from fastdllm.evaluation.baseline import TransformersEngine
from fastdllm.evaluation.command import main
from fastdllm.evaluation.families import CODE_TASKS
from fastdllm.evaluation.likelihood import (
    LIKELIHOODS,
    Pair,
    Score,
    autoregressive_scores,
    check_first_tokens,
    masked_scores,
)
from fastdllm.evaluation.progress import Progress
from fastdllm.evaluation.scoring import TaskRun, collect
from fastdllm.evaluation.store import Key, SampleStore, digest
from fastdllm.evaluation.tasks import LoadedTask
from fastdllm.runtime import clock_mhz, pick_device

PUBLISHED_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{{}}."
PUBLISHED_EDITS = {"gsm8k": "Answer:", "minerva_math": "Solution:"}  # task name prefix -> text that is replaced
GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
WARM_UP_REQUESTS = 4  # answered for one block at most
LM_EVAL_DEFAULTS = {"batch_size": 1, "device": "cuda:0"}  # what its command line passes when nothing is given


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
            self.arguments.model_path, dtype=self.dtype, device=self._device, adapter=self.arguments.adapter
        )
        self.mode = resolve_mode(self.arguments.mode, self.checkpoint)
        self.tokenizer = self.checkpoint.tokenizer
        self.model = self.checkpoint.model()
        self._check_checkpoint()
        self.tasks: Mapping[str, Task] = {}
        """For the accuracy while running; empty: not shown."""
        self.store: SampleStore | None = None
        """What was answered before, and where what is answered now is kept; None: nowhere."""
        self.requests: dict[tuple[str, int], Request] = {}
        """What was asked, by (task name, problem number)."""
        self.completions: dict[tuple[str, int], Completion] = {}
        """What was counted, by the same."""
        self.likelihood: str | None = None
        """Which log-likelihood was computed, if any."""
        self.clock_mhz: int | None = None
        """The GPU's clock after the warm-up."""
        self.seconds, self.decode_seconds = 0.0, 0.0
        """Wall time inside the engine, warm-up excluded; 0 for decode_seconds where the engine does not tell. What the
        store's samples took is part of it."""

    def keep(self, store: SampleStore) -> None:
        """Take the samples of `store` as answered, and keep in it what is answered from now on."""
        self.store = store
        self.seconds += store.seconds
        self.decode_seconds += store.decode_seconds

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
        if arguments.engine == "transformers" and model.gate is not None:
            raise ValueError(
                f"engine transformers knows no gated adapter, got {self.checkpoint.adapter}; leave the adapter out, or "
                "use engine fastdllm."
            )

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
        """Return the text of each answer, without its stop string; what was counted goes into `completions`.

        Raises:
            ValueError: a problem is asked several times, or what cannot be answered.
        """
        self._check_repeats(requests)
        queue = [self._request(number, instance) for number, instance in enumerate(requests)]
        self.requests |= zip(map(_problem, requests), queue, strict=True)
        keys = [sample_key(instance, asdict(asked)) for instance, asked in zip(requests, queue, strict=True)]
        done = {number: Completion(**sample) for number, sample in self._kept(keys).items()}
        answers = {number: completion.text for number, completion in done.items()}
        self.completions |= {_problem(requests[number]): completion for number, completion in done.items()}
        if len(done) < len(queue):
            with Progress(requests, self.tasks, answers, is_hidden=disable_tqdm) as progress:
                for completion in self._answer(queue, keys, done):
                    instance = requests[completion.index]
                    answers[completion.index] = completion.text
                    self.completions[_problem(instance)] = completion
                    self.cache_hook.add_partial("generate_until", instance.args, completion.text)
                    progress.finish(completion.index, completion.text)
        if self.arguments.show_speed:
            tokens = sum(completion.counted_tokens for completion in self.completions.values())
            print(f"{tokens} tokens in {self.seconds:.1f} s: {tokens / self.seconds:.1f} tokens/s")
        return [answers[number] for number in range(len(requests))]

    def _check_repeats(self, requests: list[Instance]) -> None:
        problems = set(self.completions)
        for instance in requests:
            if _problem(instance) in problems:
                raise ValueError(f"{instance.task_name} asks for each problem several times (repeats), set repeats: 1.")
            problems.add(_problem(instance))

    def _kept(self, keys: list[Key]) -> dict[int, Any]:
        """Return the samples that the store has, by place in `keys`."""
        samples = self.store.samples if self.store is not None else {}
        return {number: samples[key] for number, key in enumerate(keys) if key in samples}

    def _answer(self, queue: list[Request], keys: list[Key], done: Mapping[int, Any]) -> Iterator[Completion]:
        """Answer what is not done, counting the time; yield each answer once it is kept."""
        self._warm_up(queue)
        engine = self._engine()
        seconds, decode_seconds = 0.0, 0.0
        for completion in engine.run(queue, skip=done):
            if self.store is not None:
                before = seconds, decode_seconds
                seconds, decode_seconds = engine.seconds, engine.decode_seconds or 0.0
                sample = asdict(completion)
                self.store.add(keys[completion.index], sample, seconds - before[0], decode_seconds - before[1])
            yield completion
        self.seconds += engine.seconds
        self.decode_seconds += engine.decode_seconds or 0.0
        engine.free()

    def _warm_up(self, queue: list[Request]) -> None:
        """Answer a few requests in part, outside the timing: allocator, kernels and libraries set themselves up."""
        engine, most = self._engine(), self.model.block_size
        few = [replace(one, max_new_tokens=min(one.max_new_tokens, most)) for one in queue[:WARM_UP_REQUESTS]]
        list(engine.run(few))
        engine.free()
        self.clock_mhz = clock_mhz(self._device)  # now, since an idle GPU has another one

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

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Return the score of each continuation: the exact one in mode ar, the published one in mode diffusion.

        Raises:
            ValueError: an option that only decoding reads was given.
        """
        given, usual = asdict(self.arguments), asdict(HarnessArguments())
        inert = [name for name in given if name not in READ_BY_LIKELIHOOD and given[name] != usual[name]]
        if inert:
            raise ValueError(unused_by_likelihood([f"{name} {given[name]}" for name in inert]))
        self.likelihood = LIKELIHOODS[self.mode]
        print(f"log-likelihood: {self.likelihood}", flush=True)
        self._scored = requests  # what follows gets their tokens alone
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of context and continuation.

        In mode diffusion as published: lm-eval's own way hands white space at the context's end to the continuation, so
        that behind a chat template the one token that is scored would be the line break, whatever the answer.
        """
        if self.mode == "ar":
            return super()._encode_pair(context, continuation)
        before = self.tok_encode(context)
        return before, self.tok_encode(context + continuation)[len(before) :]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Score]:
        """Score batch by batch; a batch of which a score is missing is run whole, so that no score depends on it."""
        pairs = [(context, target) for _, context, target in requests]
        if self.mode == "diffusion":
            check_first_tokens([texts for texts, _, _ in requests], pairs)
        keys = [sample_key(instance, *pair) for instance, pair in zip(self._scored, pairs, strict=True)]
        scores = {number: (score, is_greedy) for number, (score, is_greedy) in self._kept(keys).items()}
        size = self.arguments.batch_size
        if len(scores) < len(pairs):
            self._score(pairs[:WARM_UP_REQUESTS])  # outside the timing, as in _warm_up
            self.clock_mhz = clock_mhz(self._device)
        with Progress(self._scored, self.tasks, scores, is_hidden=disable_tqdm) as progress:
            for start in range(0, len(pairs), size):
                batch = range(start, min(start + size, len(pairs)))
                missing = [number for number in batch if number not in scores]
                if not missing:
                    continue
                started = time.perf_counter()
                found = self._score(pairs[start : start + size])
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                for number in missing:
                    scores[number] = found[number - start]
                    if self.store is not None:
                        self.store.add(keys[number], scores[number], elapsed if number == missing[0] else 0.0)
                    progress.finish(number, scores[number])
        return [scores[number] for number in range(len(pairs))]

    def _score(self, pairs: list[Pair]) -> list[Score]:
        if self.mode == "ar":
            return autoregressive_scores(self.model, pairs)
        return masked_scores(self.model, pairs, self.eot_token_id)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise ValueError("fast_dllm_v2 has no rolling log-likelihood (nor has the published one); choose another task.")


def _problem(instance: Instance) -> tuple[str, int]:
    return instance.task_name, instance.doc_id


def sample_key(instance: Instance, *read: Any) -> Key:
    """Return what a finished sample is known by: its place in the task, and a digest of what the model reads."""
    return instance.task_name, instance.doc_id, instance.idx, digest(*read)


def published_prompt(task: str, prompt: str) -> str:
    """Return the prompt with the task's answer cue replaced as in the published harness (method.md 4)."""
    for prefix, cue in PUBLISHED_EDITS.items():
        if task.startswith(prefix):
            return prompt.replace(cue, PUBLISHED_INSTRUCTION)
    return prompt


def run_task(lm: FastDLLMv2, task: LoadedTask, *, limit: int = 0) -> TaskRun:
    """Run a task on `lm`, with its chat template unless it asks for completions; return problems scored by lm-eval.

    Args:
        lm: its `prompt` decides the examples: published is 0-shot for gsm8k and minerva_math; lm_eval, and other tasks,
            take the task's own number.
        limit: problems of each task; 0: all.
    """
    is_published = lm.arguments.prompt == "published" and any(task.name.startswith(name) for name in PUBLISHED_EDITS)
    lm.tasks = task.members
    results = simple_evaluate(
        model=lm,
        tasks=task.wanted,
        num_fewshot=0 if is_published else None,
        limit=limit or None,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=task.uses_chat,
        fewshot_as_multiturn=task.uses_chat,
        task_manager=task.manager,
        confirm_run_unsafe_code=task.name in CODE_TASKS,  # whose programs the metric runs only where that is permitted
    )
    return collect(task.name, results["samples"], lm.final_prompt)


if __name__ == "__main__":
    main()
