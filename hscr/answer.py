"""Answers with grounding: the model asked about images, with any adapter, in one thread that owns the device.

The grounding score is the alignment reward (hscr/reward.py) of the answer's least grounded word, its dropout mask seeded by the image's
digest: there is no record id online, and the same image always meets the same mask. The branch with the whole image was seen while the
answer was decoded, so grounding is one pass over the dropped prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hscr.answers import Answer, AnswerRequest, Delta, OnDelta, TokenGrounding, TokenLogprob
from hscr.gathering import Gathering
from hscr.lora_rows import LoraRows
from hscr.model import VLM, decode_text, encode_prompts
from hscr.packing import token_logprobs
from hscr.plain_decoder import PlainDecoder
from hscr.prefix import empty_cache, joinable
from hscr.prefix_cache import PrefixCache, begin
from hscr.reward import grounding_score, words_of
from hscr.running import Row, Running
from hscr.saying import Saying
from hscr.visual_tokens import Prompt, dropped

__all__ = ["Answer", "AnswerRequest", "Answerer", "Delta", "OnDelta", "TokenGrounding", "TokenLogprob"]


class Answerer:
    """A loaded model that answers; adapters share its base weights and its image features. Not thread-safe: one thread owns it.

    `prefix_cache_bytes` bounds what is kept of images across requests (hscr/prefix_cache.py); 0 keeps nothing.
    """

    def __init__(self, vlm: VLM, *, dropout_ratio: float = 0.7, prefix_cache_bytes: int = 0) -> None:
        self.vlm = vlm
        self.dropout_ratio = dropout_ratio
        self.lora = LoraRows(vlm.base, vlm.device)
        self.decoder = PlainDecoder.of(vlm)
        self.prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT folder available under `name` (use its digest). Loading a name again does nothing. Raises ValueError."""
        if name not in self.lora:
            self.lora.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        self.lora.unload(name)

    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """Answer a batch, in order. A row's answer does not depend on its batch (float32)."""
        batch = AnswerBatch(self, together=True)
        rows = batch.join(requests)
        answers: dict[Row, Answer] = {}
        while len(answers) < len(rows):
            answers.update(batch.step())
        return [answers[row] for row in rows]

    @torch.inference_mode()
    def ground(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[list[int]],
        logprobs: Sequence[Sequence[float]],
        adapters: Sequence[str | None],
        salts: Sequence[str],
    ) -> list[tuple[float, list[TokenGrounding]]]:
        """Score and per-token values of answers whose log-probabilities with the image are known: one pass with tokens dropped."""
        cut = [dropped(p, self.dropout_ratio, p.image, 0) for p in prompts]
        tails, longest = [ids[:-1] for ids in answers], max(map(len, answers))
        with self._base():
            begun = begin(self.vlm, self.lora, self.prefixes, cut, tails, adapters, salts, longest, self.decoder)
        logits = {i: own for part in begun for i, own in zip(part.numbers, part.logits, strict=True)}
        out = []
        for i, (ids, seen) in enumerate(zip(answers, logprobs, strict=True)):
            with_image = torch.tensor(seen)
            without = token_logprobs(logits[i][-len(ids) :], ids).cpu()
            rewards = with_image - without
            _, words = words_of(self.vlm, ids)
            content = {t for w in words for t in w.tokens}
            tokens = [
                TokenGrounding(self.vlm.tokenizer.decode([token]), float(a), float(b), float(r), t in content)
                for t, (token, a, b, r) in enumerate(zip(ids, with_image, without, rewards, strict=True))
            ]
            out.append((grounding_score(rewards, words), tokens))
        return out

    def _base(self) -> AbstractContextManager[Any]:
        """The adapter that a training may have left on the model is off."""
        return self.vlm.model.disable_adapter() if isinstance(self.vlm.model, PeftModel) else nullcontext()


class AnswerBatch:
    """Answers under way: requests join between steps, where `joins`, and leave whenever they are not wanted any more.

    `together`: nobody waits for one answer before all are whole, so that all are grounded in one pass.
    """

    def __init__(self, answerer: Answerer, *, together: bool = False) -> None:
        self.answerer, self.together = answerer, together
        self.joins = joinable(empty_cache(answerer.vlm))
        self._running = Running(answerer.vlm, answerer.lora, answerer.prefixes, answerer.decoder)
        self._asked: dict[Row, tuple[AnswerRequest, OnDelta | None]] = {}
        self._ended: list[Row] = []
        self._gathering = Gathering()

    def __len__(self) -> int:
        return len(self._asked)

    def join(self, requests: Sequence[AnswerRequest], listeners: Sequence[OnDelta | None] | None = None) -> list[Row]:
        """Take requests in: their prompts are computed, their first tokens said. A row each, by which `step` names its answer.

        Raises ValueError for what the model cannot be asked; then none of them is in.
        """
        if not requests:
            return []
        vlm, questions = self.answerer.vlm, [r.question for r in requests]
        prompts = encode_prompts(vlm, [r.image for r in requests], questions)
        rows = []
        listeners = listeners or [None] * len(requests)
        for request, prompt, listener in zip(requests, prompts, listeners, strict=True):
            row = Row(prompt, request.adapter, request.max_tokens, request.temperature, request.top_p, request.seed)
            row.salt, row.scored, row.n_top = request.salt, request.grounding != "none", request.logprobs
            if request.stop or listener is not None:
                row.saying = Saying(vlm, request.stop)
            rows.append(row)
        with self.answerer._base():
            ended = self._running.join(rows)
        self._asked |= {row: asked for row, *asked in zip(rows, requests, listeners, strict=True)}  # type: ignore[misc]
        self._ended += ended
        self._tell(rows)
        return rows

    def step(self) -> dict[Row, Answer]:
        """One more token an answer; those that are whole. An exception leaves nothing under way."""
        try:
            if self._running.rows:
                running = list(self._running.rows)
                with self.answerer._base():
                    self._ended += self._running.step()
                self._tell(running)
            return self._finished(self._due())
        except Exception:
            self._drop()
            raise

    def _due(self) -> list[Row]:
        """The rows that ended, to be finished now; those to be grounded wait for each other as newcomers do, a few steps at most.

        All that run stand still while answers are grounded, and several cost little more than one.
        """
        ended = [row for row in self._ended if row in self._asked]
        held = [row for row in ended if row.scored]
        running = len(self._running.rows)
        if not self._gathering.holds(len(held), running) and not (self.together and running):
            held = []
        self._ended = held
        return [row for row in ended if row not in held]

    def lost(self) -> list[Row]:
        """Answers that a failed `join` has broken off; they are under way no more."""
        alive = {*self._running.rows, *self._ended}
        gone = [row for row in self._asked if row not in alive]
        for row in gone:
            del self._asked[row]
        return gone

    def leave(self, rows: Sequence[Row]) -> None:
        """Answer these no further. An exception leaves nothing under way."""
        try:
            self._running.leave(rows)
        except Exception:
            self._drop()
            raise
        for row in rows:
            self._asked.pop(row, None)

    def _drop(self) -> None:
        self._asked, self._ended, self._gathering = {}, [], Gathering()
        self._running.clear()

    def _tell(self, rows: Sequence[Row]) -> None:
        for row in rows:
            listener = self._asked[row][1]
            if listener is not None and row.saying is not None and row not in self._ended:
                delta = row.saying.delta(row.top if row.n_top is not None else None)
                if delta is not None:
                    listener(delta)

    def _finished(self, rows: Sequence[Row]) -> dict[Row, Answer]:
        vlm = self.answerer.vlm
        kept = {row: row.ids[: row.saying.kept] if row.saying is not None else row.ids for row in rows}
        scored = [row for row in rows if row.scored and kept[row]]
        begun = time.monotonic()
        grounding = self.answerer.ground(
            [row.prompt for row in scored],
            [kept[row] for row in scored],
            [row.logprobs[: len(kept[row])] for row in scored],
            [row.adapter for row in scored],
            [row.salt for row in scored],
        ) if scored else []  # fmt: skip
        grounded, when = dict(zip(scored, grounding, strict=True)), (begun, time.monotonic())
        answers = {}
        for row in rows:
            request, listener = self._asked.pop(row)
            score, tokens = grounded.get(row, (None, None))
            stopped = row.ids[-1] in vlm.eos_ids or (row.saying is not None and row.saying.stopped)
            answers[row] = Answer(
                text=row.saying.text if row.saying is not None else decode_text(vlm, row.ids),
                token_ids=kept[row],
                tokens=tokens if request.grounding == "tokens" else None,
                score=score,
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(row.prompt.input_ids),
                completion_tokens=len(row.ids),
                logprobs=row.top[: len(kept[row])] if row.n_top is not None else None,
                grounded=when if row in grounded else None,
            )
            if listener is not None and row.saying is not None:
                delta = row.saying.delta(row.top if row.n_top is not None else None, last=True)
                if delta is not None:
                    listener(delta)
        return answers
