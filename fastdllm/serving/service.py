"""Many requests at once, from any thread: one thread decodes them, by engines that share the model."""

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from fastdllm.decoding.config import DecodeConfig
from fastdllm.decoding.engine import Engine, check_settings
from fastdllm.decoding.pieces import TextPieces
from fastdllm.decoding.policies import DEFAULT_THRESHOLD, check_parameter
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.rows import Request, check_prompt, stop_token_ids
from fastdllm.model import BlockDiffusionLM
from fastdllm.serving.answers import Answer, Setting
from fastdllm.serving.lanes import Lane

MODES = ("diffusion", "ar")


class QueueFullError(RuntimeError):
    """Too many requests wait already; ask again in a while."""


class TooLongError(ValueError):
    """Prompt and answer have more tokens than they may."""


class Service:
    """Owns the thread that decodes; promises each request the answer that an engine gives it alone.

    A setting (mode, how a block is unmasked, reuse) has its own engine, made when it is first asked for; the engines
    take turns, a round each. Requests wait in the order in which they came; one that needs a new engine while all are
    busy holds up those behind it, so that it gets one. As a context it is closed at its end.
    """

    def __init__(
        self,
        model: BlockDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: str = "diffusion",
        decode: DecodeConfig | None = None,
        modes: Collection[str] = MODES,
        batch_size: int = 16,
        max_waiting: int = 1024,
        max_tokens: int = 4096,
        max_engines: int = 4,
        cache_bytes: int | None = None,
    ):
        """Start the thread.

        Args:
            mode, decode: for requests that do not say otherwise.
            modes: that the model has; a plain Qwen2.5 has ar alone.
            batch_size: requests that an engine decodes at a time.
            max_waiting: requests that may wait; more are refused.
            max_tokens: of a request, prompt and answer.
            max_engines: settings that are served at a time.
            cache_bytes: memory for keys and values, of which each engine may have its part; None for what is free.
        Raises:
            ValueError: settings that are out of range or do not go together.
        """
        limits = dict(batch_size=batch_size, max_waiting=max_waiting, max_tokens=max_tokens, max_engines=max_engines)
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        self.model, self.tokenizer, self.mode, self.modes = model, tokenizer, mode, modes
        self.decode, self.batch_size = decode or DecodeConfig(), batch_size
        self.max_waiting, self.max_tokens, self.max_engines = max_waiting, max_tokens, max_engines
        self.stop_ids = stop_token_ids(tokenizer)
        self.tokenizing = threading.Lock()
        """To be held while text becomes tokens: a fast tokenizer asked by two threads may say "already borrowed"."""
        self._engine_bytes = None if cache_bytes is None else cache_bytes // max_engines
        self._changed = threading.Condition()
        self._waiting: dict[Setting, deque[Answer]] = {}
        self._cancelled: list[Answer] = []
        self._placed: deque[tuple[Lane, Answer]] = deque()  # that no longer wait and have not begun
        self._lanes: dict[Setting, Lane] = {}  # the one used last stands last
        self._closed = ""  # why, once it is
        self._num_submitted = 0
        self._place(Request(prompt=[0], max_new_tokens=1), mode, self.decode, ReuseConfig())
        tokenizer("", add_special_tokens=False)  # the first call may change its settings, which no thread may see it do
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def submit(
        self,
        request: Request,
        *,
        mode: str | None = None,
        decode: DecodeConfig | None = None,
        reuse: ReuseConfig | None = None,
        is_watched: bool = False,
    ) -> Answer:
        """Let a request wait for its turn; return its answer, which fills from now on.

        Args:
            mode, decode: None for the service's own, of which mode ar takes what it reads.
            is_watched: whether updates tell what is drafted but not final.
        Raises:
            ValueError: a request that is too long or cannot be answered, or settings that do not go together.
            QueueFullError: as many wait already as may. RuntimeError: the service is closed.
        """
        mode = mode or self.mode
        if decode is None:
            decode = self.decode.token_by_token if mode == "ar" else self.decode
        request, setting = self._place(request, mode, decode, reuse or ReuseConfig())
        self._check(request)
        answer = Answer(request, setting, is_watched, self._cancel)
        with self._changed:
            if self._closed:
                raise RuntimeError(self._closed)
            if self._num_waiting >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already, the most that may; try again later.")
            self._waiting.setdefault(setting, deque()).append(answer)
            self._num_submitted += 1
            self._changed.notify_all()
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return not self._closed

    def pieces(self, request: Request) -> TextPieces:
        """Return what turns the final tokens of the request's answer into text that can be shown."""
        return TextPieces(self.tokenizer, self.stop_ids, request.stop_strings)

    def counts(self) -> dict[str, int]:
        """Return how many requests wait, are being decoded and have ended, and how many engines there are."""
        with self._changed:
            waiting, running = self._num_waiting, sum(lane.num_taken for lane in self._lanes.values())
            ended = self._num_submitted - waiting - running
            return dict(waiting=waiting, running=running, ended=ended, engines=len(self._lanes))

    def close(self) -> None:
        """Fail what is not answered yet, and end the thread."""
        with self._changed:
            self._closed = self._closed or "the service is closed."
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _place(self, request: Request, mode: str, decode: DecodeConfig, reuse: ReuseConfig) -> tuple[Request, Setting]:
        """Return the setting, of all that mean the same one, and the request with its own part of it."""
        if mode not in self.modes:
            raise ValueError(
                f"mode must be {' or '.join(self.modes)}, got {mode!r}; diffusion needs an adapted checkpoint."
            )
        if decode.temperature == 0:
            decode = replace(decode, top_p=DecodeConfig.top_p)  # which nothing reads then
        check_settings(self.model, mode, decode, reuse)
        if mode == "ar":
            if request.parameter is not None:
                raise ValueError("a request's parameter has no effect token by token (mode ar); leave it out.")
            return request, Setting(mode, decode.token_by_token, reuse)
        if decode.is_verified:
            if request.parameter is not None:
                check_parameter(decode.policy, request.parameter)  # which refuses any
            return request, Setting(mode, decode, reuse)
        parameter = decode.parameter if request.parameter is None else request.parameter
        check_parameter(decode.policy, parameter)
        shared = replace(decode, threshold=DEFAULT_THRESHOLD, policy_parameter=0.0)
        return replace(request, parameter=parameter), Setting(mode, shared, reuse)

    def _check(self, request: Request) -> None:
        length, num_known = len(request.prompt), self.model.qwen.config.vocab_size
        if length + request.max_new_tokens > self.max_tokens:
            left = self.max_tokens - length
            way_out = f"ask for at most {left} new ones" if left > 0 else f"shorten the prompt by {1 - left} or more"
            raise TooLongError(
                f"prompt and answer may have {self.max_tokens} tokens together, got {length} + "
                f"{request.max_new_tokens}; {way_out}."
            )
        wrong = next((token for token in request.prompt if not 0 <= token < num_known), None)
        if wrong is not None:
            raise ValueError(
                f"token ids of a prompt must be 0 to {num_known - 1}, got {wrong}; the model has no other."
            )
        check_prompt("the prompt", request.prompt, self.model.mask_token_id)

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            if not answer.is_ended:
                self._cancelled.append(answer)
                self._changed.notify_all()

    def _work(self) -> None:
        try:
            if self.model.device.type == "cuda":
                torch.cuda.set_device(self.model.device)  # each thread has its own
            while self._take_orders():
                for lane in list(self._lanes.values()):
                    if lane.answers:
                        lane.round()
        except BaseException as error:
            self._closed = f"the decoding thread has ended: {type(error).__name__}: {error}"
            raise
        finally:
            self._fail_all()

    def _take_orders(self) -> bool:
        """Wait for work, drop what was cancelled and hand requests to lanes; return whether to go on."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._closed:
                return False
            cancelled, self._cancelled = self._cancelled, []
            for answer in cancelled:
                self._forget(answer)
            retired = self._assign()
        for answer in cancelled:
            answer.fail("the request was cancelled.", is_cancelled=True)
        for answer in cancelled:
            any(lane.drop(answer) for lane in self._lanes.values())
        for lane in retired:
            lane.close()
        while self._placed:
            lane, answer = self._placed.popleft()
            lane.take(answer)
        return True

    @property
    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _has_work(self) -> bool:
        lanes = self._lanes.values()
        return bool(self._closed or self._waiting or self._cancelled or any(lane.answers for lane in lanes))

    def _forget(self, answer: Answer) -> None:
        """Take an answer out of those that wait, if it is one of them."""
        queue = self._waiting.get(answer.setting, deque())
        if answer in queue:
            queue.remove(answer)
            if not queue:
                del self._waiting[answer.setting]

    def _assign(self) -> list[Lane]:
        """Place the waiting answers that can begin in their lanes; return the lanes that make room for new ones."""
        retired = []
        for setting in sorted(self._waiting, key=lambda setting: self._waiting[setting][0].submitted):
            lane, queue = self._lane(setting, retired), self._waiting[setting]
            if lane is None:  # nobody behind it begins before one of the others is idle and makes room
                break
            while queue and lane.num_free > 0:
                lane.reserved += 1
                self._placed.append((lane, queue.popleft()))
            if not queue:
                del self._waiting[setting]
        return retired

    def _lane(self, setting: Setting, retired: list[Lane]) -> Lane | None:
        """Return the setting's lane, a new one if there may be; None if all are busy."""
        if setting not in self._lanes and len(self._lanes) >= self.max_engines:
            idle = next((other for other, lane in self._lanes.items() if not lane.num_taken), None)
            if idle is None:
                return None
            retired.append(self._lanes.pop(idle))
        lane = self._lanes.pop(setting, None) or Lane(lambda: self._engine(setting), self.batch_size, self.max_tokens)
        self._lanes[setting] = lane
        return lane

    def _engine(self, setting: Setting) -> Engine:
        mode, decode, reuse = setting
        return Engine(
            self.model,
            self.tokenizer,
            mode=mode,
            decode=decode,
            reuse=reuse,
            batch_size=self.batch_size,
            cache_bytes=self._engine_bytes,
        )

    def _fail_all(self) -> None:
        with self._changed:
            self._closed = self._closed or "the service is closed."
            left = [answer for _, answer in self._placed]
            left += [answer for queue in self._waiting.values() for answer in queue]
            self._waiting, self._cancelled = {}, []
            self._placed.clear()
        for lane in self._lanes.values():
            lane.fail(self._closed)
        for answer in left:
            answer.fail(self._closed)
