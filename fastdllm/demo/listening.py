"""Asking the service, and what an answer looks like from moment to moment: for the terminal and the page."""

from collections.abc import AsyncIterator, Iterator, Sequence

from fastdllm.demo.conversation import ChatSettings, Cost, Message, Moment, Speaker
from fastdllm.serving.answers import Answer, Update
from fastdllm.serving.service import Service


class Listener:
    """Asks the service for answers to conversations."""

    def __init__(self, speaker: Speaker, service: Service, *, max_new_tokens: int, seed: int = 0):
        self.speaker, self.service, self.max_new_tokens, self.seed = speaker, service, max_new_tokens, seed

    def ask(self, messages: Sequence[Message], settings: ChatSettings, max_new_tokens: int | None = None) -> "Asked":
        """Let the next answer of the conversation wait for its turn.

        Raises:
            ValueError: settings that the model does not have, or a conversation that is too long. QueueFullError: too
                many wait already.
        """
        self.speaker.check(settings)
        with self.service.tokenizing:
            request = self.speaker.request(messages, settings, max_new_tokens or self.max_new_tokens, self.seed)
        mode, decode, reuse = self.speaker.options(settings)
        answer = self.service.submit(request, mode=mode, decode=decode, reuse=reuse, is_watched=True)
        return Asked(self.speaker, self.service, answer)


class Asked:
    """An answer that is awaited, by one reader; as a context it is cancelled at the exit if it has not ended."""

    def __init__(self, speaker: Speaker, service: Service, answer: Answer):
        self.answer = answer
        self._speaker, self._stop_ids, self._pieces = speaker, service.stop_ids, service.pieces(answer.request)

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *exception) -> None:
        self.answer.cancel()

    def __iter__(self) -> Iterator[Moment]:
        """Wait for moments until the end; joined, their texts are the answer's. RuntimeError: it failed."""
        for update in self.answer:
            yield self._moment(update)
        yield self._last()

    async def __aiter__(self) -> AsyncIterator[Moment]:
        """As __iter__, without holding up the event loop."""
        async for update in self.answer:
            yield self._moment(update)
        yield self._last()

    def _moment(self, update: Update) -> Moment:
        return Moment(self._pieces.feed(update.tokens), self._speaker.draft_pieces(update.draft or [], self._stop_ids))

    def _last(self) -> Moment:
        """Return what is left of the text, half characters too; RuntimeError: the answer has failed."""
        self.answer.result()
        return Moment(self._pieces.finish(), [])

    @property
    def end(self) -> str:
        """What ended the answer: stop, or length for the limit."""
        return "stop" if self.answer.tokens[-1] in self._stop_ids else "length"

    @property
    def cost(self) -> Cost:
        """What the answer took, once it has ended; the seconds are those in its slot."""
        done = self.answer.result()
        passes = done.denoise_passes + done.append_passes
        return Cost(
            num_tokens=done.counted_tokens,
            seconds=self.answer.seconds,
            tokens_per_forward=done.counted_tokens / passes if passes else 0.0,
            num_prompt_tokens=len(self.answer.request.prompt),
            cached_tokens=self.answer.cached_tokens,
        )
