"""An answer's text while its tokens come: what may be told already, and where a stop string ends it.

Held back is what later tokens may change: half a character, spaces at the end (an answer has none), what may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from hscr.answers import Delta, TokenLogprob
from hscr.model import VLM


class Saying:
    """One answer. Joined deltas are `text`, `kept` tokens and their log-probabilities, exactly."""

    def __init__(self, vlm: VLM, stop: Sequence[str] = ()) -> None:
        self._vlm, self._stop = vlm, [s for s in stop if s]
        # A tokenizer that tidies spaces up afterwards may take back what it said: then all is told at the end.
        self._rewrites = bool(getattr(vlm.tokenizer, "clean_up_tokenization_spaces", False))
        self._ids: list[int] = []
        self._raw = ""  # of all tokens, spaces around it included
        self._ends: list[int] = []  # in the raw text, by token
        self._told = self._told_tokens = 0
        self.stopped = False
        self._cut: int | None = None  # where the stop string begins in the raw text

    def push(self, token: int) -> None:
        """The next token; `stopped` is set where it completes a stop string."""
        self._ids.append(token)
        self._raw = self._vlm.tokenizer.decode(self._ids, skip_special_tokens=True)
        self._ends.append(len(self._raw))
        found = [at for s in self._stop if (at := self._raw.find(s)) >= 0]
        if found:
            self.stopped, self._cut = True, min(found)

    @property
    def text(self) -> str:
        return self._raw[: self._cut].strip()

    @property
    def kept(self) -> int:
        """How many tokens are the answer's: all but those that lie in a stop string."""
        if self._cut is None:
            return len(self._ids)
        # One that begins before the stop string, or that ends there: it completes a character.
        pairs = zip([0, *self._ends[:-1]], self._ends, strict=True)
        return sum(start < self._cut or end <= self._cut for start, end in pairs)

    def delta(self, logprobs: Sequence[TokenLogprob] | None = None, *, last: bool = False) -> Delta | None:
        """What can be told since the last one; None where that is nothing. `logprobs` are all tokens' so far."""
        upto, tokens = (len(self.text), self.kept) if last else self._safe()
        if upto <= self._told and not (last and tokens > self._told_tokens):
            return None
        text, first = self.text[self._told : upto], self._told_tokens
        self._told, self._told_tokens = upto, tokens
        chosen = None if logprobs is None else list(logprobs[first:tokens])
        return Delta(text, self._ids[first:tokens], chosen)

    def _safe(self) -> tuple[int, int]:
        """How much of the text, and how many tokens, no later token can change."""
        if self._rewrites:
            return self._told, self._told_tokens
        raw = self._raw.rstrip("\ufffd").rstrip() if self._cut is None else self._raw[: self._cut].rstrip()
        if self._cut is None:
            held = max((_overlap(raw_end, s) for s in self._stop for raw_end in [self._raw]), default=0)
            raw = raw[: min(len(raw), len(self._raw) - held)].rstrip()
        tokens = max(self._told_tokens, sum(end <= len(raw) for end in self._ends))
        return max(self._told, len(raw.strip())), min(tokens, self.kept)


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
