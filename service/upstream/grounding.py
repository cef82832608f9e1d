"""How far an answer rests on the image, where the model server tells log-probabilities of prompts (vLLM's `prompt_logprobs`).

The answer is read again twice, teacher-forced, with the image and with a share of its cells black: visual tokens cannot be dropped through
HTTP. So the score is another one than the local engine's, and no version's threshold holds for it (docs/decisions/0066). What cannot be had
is said in fixed words and is no error.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from PIL import Image

from hscr.answers import TokenGrounding
from hscr.artifacts import bytes_digest
from hscr.config import PreferenceConfig
from hscr.masking import blackened, drawn_cells
from hscr.words import spans_of, words_at
from service.engine import Question
from service.errors import Problem
from service.upstream.completion import Said, messages
from service.upstream.server import ModelServer, NotServed

SIDE = 24  # cells a side, as many as LLaVA-1.5's tower has patches
RATIO = PreferenceConfig.dropout_ratio
PERTURBATION = f"patch_mask {SIDE}x{SIDE}"
NO_LOGPROBS = "The model server tells no log-probabilities of prompts."
NOT_SPELT = "The model server's tokens do not spell the answer."
NOT_NOW = "The model server did not answer when it was asked for the score."
NOTHING_SAID = "There is no answer to score."


@dataclass(frozen=True)
class Ground:
    score: float | None
    tokens: list[TokenGrounding] | None
    unavailable: str | None


async def ground(server: ModelServer, question: Question, said: Said, model: str) -> Ground:
    """The score of what was said: never an error."""
    if not said.text.strip():
        return Ground(None, None, NOTHING_SAID)
    if not server.vllm or not said.prompt_tokens:
        return Ground(None, None, NO_LOGPROBS)
    try:
        seen, hidden = await asyncio.gather(
            _forced(server, question, said, model, list(question.images)),
            _forced(server, question, said, model, await asyncio.to_thread(_hidden, question.images)),
        )
    except (Problem, NotServed):
        return Ground(None, None, NOT_NOW)
    if seen is None or hidden is None:
        return Ground(None, None, NO_LOGPROBS)
    pieces = [text for text, _ in seen]
    spans = spans_of(said.text, pieces) if pieces == [text for text, _ in hidden] else None
    if not pieces or spans is None:
        return Ground(None, None, NOT_SPELT)
    rewards = [a - b for (_, a), (_, b) in zip(seen, hidden, strict=True)]
    words = words_at(said.text, spans)
    content = {t for word in words for t in word.tokens}
    score = min((sum(rewards[t] for t in word.tokens) for word in words), default=0.0)
    tokens = [
        TokenGrounding(text, a, b, a - b, t in content)
        for t, ((text, a), (_, b)) in enumerate(zip(seen, hidden, strict=True))
    ]
    return Ground(score, tokens, None)


async def _forced(
    server: ModelServer, question: Question, said: Said, model: str, images: list[Image.Image]
) -> list[tuple[str, float]] | None:
    """The answer's tokens with their log-probabilities after the question about these images; None where the server tells none.

    The prompt ends with the answer, left open, and is longer than the question's by the answer's tokens: both images have one size, so
    they take equally many.
    """
    asked = await asyncio.to_thread(messages, question, images)
    answer = await server.once(
        {
            "model": model,
            "messages": [*asked, {"role": "assistant", "content": said.text}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 0,
            "max_tokens": 1,
            "temperature": 0,
        }
    )
    try:
        told, n = answer["prompt_logprobs"], int(answer["usage"]["prompt_tokens"]) - said.prompt_tokens
        if not isinstance(told, list) or not 0 < n < len(told):
            return [] if isinstance(told, list) else None
        # Where a position lists several tokens, the prompt's own is the first.
        own = [next(iter(position.values())) for position in told[-n:]]
        return [(str(t["decoded_token"]), float(t["logprob"])) for t in own]
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        return None


def _hidden(images: tuple[Image.Image, ...]) -> list[Image.Image]:
    """The same image is always hidden in the same way: online there is no record's id to seed the mask."""
    return [
        blackened(i, drawn_cells(SIDE, RATIO, [int(bytes_digest(i.tobytes())[7:23], 16), n]))
        for n, i in enumerate(images)
    ]
