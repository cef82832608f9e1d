"""Answers with grounding: the model asked about images, with any adapter, in one thread that owns the device.

The grounding score is the alignment reward (hscr/reward.py) of the answer's least grounded word, its dropout mask seeded by the image's
digest: there is no record id online, and the same image always meets the same mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from hscr.answers import Answer, AnswerRequest, Delta, OnDelta, TokenGrounding, TokenLogprob
from hscr.artifacts import bytes_digest
from hscr.decode import decode
from hscr.model import VLM, decode_text, encode_prompts
from hscr.packing import token_logprobs
from hscr.parent import read_adapter
from hscr.reward import branches, grounding_score, words_of
from hscr.visual_tokens import Prompt

__all__ = ["Answer", "AnswerRequest", "Answerer", "Delta", "OnDelta", "TokenGrounding", "TokenLogprob"]


def _key(name: str) -> str:
    """A module name for an adapter's name: peft allows no dot there, and two names must never share one."""
    return "a" + bytes_digest(name.encode()).removeprefix("sha256:")[:32]


class Answerer:
    """A loaded model that answers; adapters share its base weights and its image features. Not thread-safe: one thread owns it."""

    def __init__(self, vlm: VLM, *, dropout_ratio: float = 0.7) -> None:
        self.vlm = vlm
        self.dropout_ratio = dropout_ratio
        self._adapters: set[str] = set()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT folder available under `name` (use its digest). Loading a name again does nothing. Raises ValueError."""
        if name in self._adapters:
            return
        key, config = _key(name), read_adapter(folder)
        try:
            if not isinstance(self.vlm.model, PeftModel):
                self.vlm.model = get_peft_model(self.vlm.model, config, adapter_name=key)
            self.vlm.model.load_adapter(str(folder), adapter_name=key)
        except Exception as error:  # peft raises RuntimeError, KeyError, ValueError: the weights are another model's
            self._delete(key)
            raise ValueError("the adapter does not fit this model") from error
        self.vlm.model.requires_grad_(False).eval()
        self._adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        if name in self._adapters:
            self._adapters.discard(name)
            self._delete(_key(name))

    def _delete(self, key: str) -> None:
        """Take one adapter's layers out, and the wrapper with the last of them: peft cannot disable what isn't there."""
        if isinstance(self.vlm.model, PeftModel) and key in self.vlm.model.peft_config:
            if len(self.vlm.model.peft_config) == 1:
                self.vlm.model = self.vlm.model.unload()
            else:
                other = next(k for k in self.vlm.model.peft_config if k != key)
                self.vlm.model.set_adapter(other, inference_mode=True)  # peft warns where the active one goes
                self.vlm.model.delete_adapter(key)

    @contextmanager
    def _policy(self, adapter: str | None) -> Iterator[None]:
        """Run as the base or as one adapter. One adapter at a time: no per-row hooks that an exception could leave behind."""
        if adapter is None:
            if isinstance(self.vlm.model, PeftModel):
                with self.vlm.model.disable_adapter():
                    yield
            else:
                yield
        elif adapter not in self._adapters:
            raise ValueError("no adapter of that name is loaded")
        else:
            self.vlm.model.set_adapter(_key(adapter), inference_mode=True)
            yield

    @torch.no_grad()
    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Answer a batch, in order; requests of one adapter are decoded together. A row's answer does not depend on its batch (float32)."""
        questions: list[Any] = [r.question for r in requests]
        prompts = encode_prompts(self.vlm, [r.image for r in requests], questions)
        answers: dict[int, Answer] = {}
        for adapter in dict.fromkeys(r.adapter for r in requests):
            rows = [i for i, r in enumerate(requests) if r.adapter == adapter]
            with self._policy(adapter):
                made = self._answer([requests[i] for i in rows], [prompts[i] for i in rows])
            answers.update(zip(rows, made, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _answer(self, requests: Sequence[AnswerRequest], prompts: Sequence[Prompt]) -> list[Answer]:
        ids = decode(
            self.vlm,
            prompts,
            max_tokens=[r.max_tokens for r in requests],
            temperature=[r.temperature for r in requests],
            seeds=[r.seed for r in requests],
        )
        scored = [i for i, r in enumerate(requests) if r.grounding != "none" and ids[i]]
        grounding = dict(
            zip(scored, self.ground([prompts[i] for i in scored], [ids[i] for i in scored]), strict=True)
            if scored
            else ()
        )
        answers = []
        for i, (request, row) in enumerate(zip(requests, ids, strict=True)):
            score, tokens = grounding.get(i, (None, None))
            answers.append(
                Answer(
                    text=decode_text(self.vlm, row),
                    token_ids=row,
                    tokens=tokens if request.grounding == "tokens" else None,
                    score=score,
                    finish_reason="stop" if row and row[-1] in self.vlm.eos_ids else "length",
                    prompt_tokens=len(prompts[i].input_ids),
                    completion_tokens=len(row),
                )
            )
        return answers

    def ground(
        self, prompts: Sequence[Prompt], answers: Sequence[list[int]]
    ) -> list[tuple[float, list[TokenGrounding]]]:
        """Score and per-token values of given answers: one batched teacher-forced pass with and one without dropped tokens."""
        scored = branches(self.vlm, prompts, answers, [p.image for p in prompts], dropout_ratio=self.dropout_ratio)
        out = []
        for ids, branch in zip(answers, scored, strict=True):
            with_image, without = token_logprobs(branch.full, ids), token_logprobs(branch.dropped, ids)
            rewards = with_image - without
            _, words = words_of(self.vlm, ids)
            content = {t for w in words for t in w.tokens}
            tokens = [
                TokenGrounding(self.vlm.tokenizer.decode([token]), float(a), float(b), float(r), t in content)
                for t, (token, a, b, r) in enumerate(zip(ids, with_image, without, rewards, strict=True))
            ]
            out.append((grounding_score(rewards, words), tokens))
        return out
