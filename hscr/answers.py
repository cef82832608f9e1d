"""What is asked of a model and what comes back: plain data that needs no torch, so that the service and other engines may speak it.

How it is answered is in hscr/answer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hscr.chat import Turn
    from hscr.images import Images

TOKEN_DROPOUT = (
    "token_dropout"  # visual tokens removed (hscr/visual_tokens.py): what versions' thresholds are measured with
)


@dataclass(frozen=True)
class AnswerRequest:
    """One question on one image, or on several in order. `adapter` is a name given to `load_adapter`, None the base."""

    image: Images
    question: str | tuple[Turn, ...]
    adapter: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    grounding: str = "none"  # none | summary | tokens
    top_p: float = 1.0  # sample from the likeliest tokens that make up this share; 1: from all
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    logprobs: int | None = None  # every token's log-probability and that many alternatives; None: not wanted
    salt: str = ""  # requests share the caches of their prompts with those of the same salt only


@dataclass(frozen=True)
class TokenGrounding:
    """A token of the answer: log-probabilities (nats) with and without the image, their difference, and whether a word's."""

    text: str
    logprob: float
    logprob_without_image: float
    reward: float
    is_content: bool


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was said, its log-probability (nats, at temperature 1), and the likeliest tokens in its place with theirs."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """`token_ids` include the end of sequence where the model said it, and nothing of a stop string; `completion_tokens` counts both.

    `score` is None where no grounding was asked for, `logprobs` where none were; those stand one a token. `perturbation` is how the image
    was hidden for the score, `unavailable` why there is none though it was asked for; `grounded`: when the score was computed, from and to
    (time.monotonic), together with those of others.
    """

    text: str
    token_ids: list[int]
    tokens: list[TokenGrounding] | None
    score: float | None
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[TokenLogprob] | None = None
    perturbation: str = TOKEN_DROPOUT
    unavailable: str | None = None
    grounded: tuple[float, float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Delta:
    """What was said since the last one. Joined deltas are the answer's text, token_ids and logprobs exactly.

    The text holds no half character and nothing that may still turn out to be a stop string.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


OnDelta = Callable[[Delta], None]
