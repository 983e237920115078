"""Final tokens as text that can be shown: no half character, and nothing that a stop string may still cut off."""

from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # stands for bytes that are no character, or not yet


class TextPieces:
    """Turns the tokens of one answer, as they become final, into pieces; joined they are the completion's text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], stop_strings: Iterable[str] = ()):
        self.tokenizer, self.stop_ids, self.stop_strings = tokenizer, stop_ids, tuple(stop_strings)
        self._tokens: list[int] = []  # whose text is not whole yet
        self._text, self._shown = "", 0

    def feed(self, tokens: Iterable[int]) -> str:
        """Return what can be shown now that these tokens are final; often nothing."""
        self._tokens += [token for token in tokens if token not in self.stop_ids]
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=False)
        if not text.endswith(HALF):  # half a character waits for its other tokens
            self._text, self._tokens = self._text + text, []
        return self._show(self._text[: self._num_safe()])

    def finish(self) -> str:
        """Return what is left when no more tokens will come."""
        text = self._text + self.tokenizer.decode(self._tokens, skip_special_tokens=False)
        return self._show(cut_text(text, self.stop_strings))

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

    def _num_safe(self) -> int:
        """Return how much of the text no stop string can cut off any more."""
        text = self._text
        ends = [text.find(stop) if stop in text else len(text) - _overlap(text, stop) for stop in self.stop_strings]
        return min(ends, default=len(text))


def cut_text(text: str, stop_strings: Iterable[str]) -> str:
    """Return the text before the stop string that is whole first; of those whole at the same place, the longest one.

    So it is the same whether the answer ended there, as token by token, or at the end of a block behind it.
    """
    starts = [(text.find(stop), stop) for stop in stop_strings if stop in text]
    _, start = min(((start + len(stop), start) for start, stop in starts), default=(0, len(text)))
    return text[:start]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
