"""One engine at work for a service: the answers that it is filling, round by round."""

import time
from collections.abc import Callable

from fastdllm.decoding.engine import Engine
from fastdllm.decoding.rows import Row
from fastdllm.decoding.session import Session
from fastdllm.serving.answers import Answer


class Lane:
    """Owns an engine of one setting and the answers in it; an error ends these answers and no others."""

    def __init__(self, make_engine: Callable[[], Engine], batch_size: int, max_tokens: int):
        """The engine is made when the first answer comes, and anew after an error."""
        self._make_engine, self._batch_size, self._max_tokens = make_engine, batch_size, max_tokens
        self._session: Session | None = None
        self.answers: dict[Row, Answer] = {}
        self.reserved = 0
        """Answers that are about to come."""

    @property
    def num_taken(self) -> int:
        return len(self.answers) + self.reserved

    @property
    def num_free(self) -> int:
        """Slots that nobody has or is about to have."""
        batch_size = self._session.engine.batch_size if self._session else self._batch_size
        return batch_size - self.num_taken

    def take(self, answer: Answer) -> None:
        """Let an answer begin; one that cannot is failed."""
        self.reserved -= 1
        try:
            if self._session is None:
                self._session = self._make_engine().open(self._max_tokens)
            row = self._session.submit(answer.request, is_watched=answer.is_watched)
        except Exception as error:  # the answer's own; others, and the thread that serves them, are not touched by it
            answer.fail(_message(error))
            return
        self.answers[row] = answer

    def drop(self, answer: Answer) -> bool:
        """Forget an answer; return whether it was here."""
        row = next((row for row, other in self.answers.items() if other is answer), None)
        if row is None:
            return False
        self._session.drop(row)
        del self.answers[row]
        return True

    def round(self) -> None:
        """Run one pass of every slot, and hand on what it gave."""
        try:
            self._round()
        except Exception as error:  # whatever it is, it must not end the thread that serves others too
            self.fail(_message(error))

    def _round(self) -> None:
        started = time.perf_counter()
        moved = self._session.round()
        for row in (*self._session.active, *moved):
            self.answers[row].begin(started, row.cached_tokens)
        for row in moved:
            answer = self.answers[row]
            answer.put(row.tokens, row.draft)
            if row.is_finished:
                completion = row.completion(self._session.engine.tokenizer)
                del self.answers[row]
                answer.finish(completion)

    def fail(self, error: str) -> None:
        """End every answer with the error, and leave the engine, whose state nobody knows, to be collected."""
        if self._session:
            self._session.engine.free()
        answers, self.answers, self._session = self.answers, {}, None
        for answer in answers.values():
            answer.fail(error)

    def close(self) -> None:
        """Give the memory back; nothing may be under way."""
        if self._session:
            self._session.close()
            self._session.engine.free()
            self._session = None


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
