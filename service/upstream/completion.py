"""A question as the body of a completion, and a completion's chunks as our answer. Knows the shapes of both, and no connection."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from hscr.answers import Delta, TokenLogprob
from hscr.chat import turns_of
from service.engine import Question
from service.upstream.server import garbage

# The server's tokenizer is not at hand, so whatever looks like a special token is broken up, as hscr.chat.plain does with the known ones.
_SPECIAL = re.compile(r"<(?=[|/]?[A-Za-z_][\w\- ]{0,40}[|]?>)|\[(?=/?[A-Z_]{2,20}\])")


def messages(question: Question, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The conversation with these images in the place of its own, as PNG data URLs before their turn's text. Slow: pixels are packed."""
    left = iter(images)
    out: list[dict[str, Any]] = []
    for turn in turns_of(question.text, len(images)):
        text = _SPECIAL.sub(lambda m: m.group() + " ", turn.text)
        if not turn.n_images:
            out.append({"role": turn.role, "content": text})
            continue
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _png(next(left))}} for _ in range(turn.n_images)
        ]
        out.append({"role": turn.role, "content": [*parts, {"type": "text", "text": text}]})
    return out


def body(question: Question, said: list[dict[str, Any]], model: str, vllm: bool) -> dict[str, Any]:
    """What is sent for an answer. Only a vLLM gets fields that are not OpenAI's."""
    out: dict[str, Any] = {
        "model": model,
        "messages": said,
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "top_p": question.top_p,
        "seed": question.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.stop:
        out["stop"] = list(question.stop)
    if question.logprobs is not None:
        out |= {"logprobs": True, "top_logprobs": question.logprobs}
    if vllm:
        out["return_token_ids"] = True
        if question.salt:
            out["cache_salt"] = question.salt
    return out


class Said:
    """Chunks added up: the answer's text, tokens and counts. Raises Problem on what is no chunk."""

    def __init__(self) -> None:
        self.text, self.token_ids, self.logprobs = "", list[int](), list[TokenLogprob]()
        self.finish_reason: str | None = None
        self.prompt_tokens = self.completion_tokens = 0

    def add(self, chunk: dict[str, Any]) -> Delta:
        try:
            if chunk.get("usage"):
                self.prompt_tokens = int(chunk["usage"]["prompt_tokens"])
                self.completion_tokens = int(chunk["usage"]["completion_tokens"])
            choices = chunk["choices"]
            return self._choice(choices[0]) if choices else Delta("", [])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            raise garbage() from None

    def _choice(self, choice: dict[str, Any]) -> Delta:
        text = choice["delta"].get("content") or ""
        if not isinstance(text, str):
            raise TypeError
        ids = [int(i) for i in choice.get("token_ids") or ()]
        told = (choice.get("logprobs") or {}).get("content") or []
        logprobs = [
            TokenLogprob(
                ids[n] if len(ids) == len(told) else -1,
                str(t["token"]),
                _finite(t["logprob"]),
                [(str(o["token"]), _finite(o["logprob"])) for o in t.get("top_logprobs") or ()],
            )
            for n, t in enumerate(told)
        ]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.text += text
        self.token_ids += ids
        self.logprobs += logprobs
        return Delta(text, ids, logprobs or None)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # it travels a local network, and packing well takes far longer
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
