"""The local engine: the only module of the API that loads torch, and only when its `load` runs, in the thread that then owns the device.

Adapters are loaded when first asked for, by digest, after their files were checked; the least recently used ones leave where their bytes
exceed the bound, never one that an answer under way is given with.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hscr.answers import Answer, AnswerRequest
from hscr.artifacts import verify_manifest
from service.batcher import Entry, Whole
from service.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from hscr.answer import AnswerBatch, Answerer
    from hscr.chat import Turn
    from hscr.model import VLM
    from hscr.running import Row

log = logging.getLogger("hscr.engine")


@dataclass(frozen=True)
class Question:
    """One question with everything resolved: the adapter is a digest and the folder that it names."""

    images: tuple[Image.Image, ...]
    text: str | tuple[Turn, ...]
    adapter_digest: str | None
    adapter_folder: Path | None
    max_tokens: int
    temperature: float
    seed: int
    grounding: str
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    salt: str = ""


class AdapterDamaged(Exception):
    """An adapter's stored files are not what its digest says, or cannot be loaded."""


@dataclass
class Stats:
    """Counts since the start, written by the engine's thread; any thread may read them."""

    questions: int = 0  # answered
    tokens: int = 0  # said
    adapters: int = 0  # loaded now
    adapter_bytes: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_bytes: int = 0
    feature_hits: int = 0
    feature_misses: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0


class LocalEngine:
    """transformers + peft's adapters. Not thread-safe: the batcher's thread calls all but `cost`.

    Questions join and leave between decode steps, each with its adapter; models whose cache cannot take newcomers are asked whole batches.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stats = Stats()
        self.joins = False  # known after `load`
        self.model_digest: str | None = None
        self.several_images = False  # whether the model's family takes several images a prompt; known after `load`
        self._answerer: Answerer | None = None
        self._batch: AnswerBatch | None = None
        self._whole: Whole[Question, Answer] = Whole(lambda questions: self.answer(questions))
        self._entries: dict[Row, Entry[Question, Answer]] = {}
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._image_tokens: dict[tuple[tuple[int, int], ...], int] = {}  # what prompts with images of such sizes took

    def load(self) -> None:
        import torch

        from hscr.model import load_model

        torch.set_num_threads(self.settings.engine_threads)
        s = self.settings
        features = None if s.features_folder == "off" else Path(s.features_folder)
        vlm = load_model(
            s.model_path, dtype=s.dtype, device=s.device, revision=s.model_revision, feature_cache=features
        )
        self.use(vlm)
        log.info("model %s loaded, digest %s", s.model_id, vlm.digest)

    def use(self, vlm: VLM) -> None:
        """Answer by this model; a part of `load`."""
        from hscr.answer import AnswerBatch, Answerer

        self._answerer = Answerer(vlm, prefix_cache_bytes=self.settings.prefix_cache_max_bytes)
        self._batch = AnswerBatch(self._answerer)
        self.joins = self.settings.scheduling == "continuous" and self._batch.joins
        self.model_digest = vlm.digest
        self.several_images = vlm.family.several_images

    def unload(self) -> None:
        """Free the device; nothing runs. `load` brings everything back but the adapters, which come when they are asked for."""
        import gc

        import torch

        self._answerer, self._batch, self._entries = None, None, {}
        self._loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def cost(self, question: Question) -> int:
        """Tokens of prompt and answer: images as those of their sizes took before, text at three characters a token."""
        text = question.text if isinstance(question.text, str) else "".join(turn.text for turn in question.text)
        known = self._image_tokens
        images = known.get(_sizes(question), max(known.values(), default=1024))
        return images + len(text) // 3 + question.max_tokens

    def join(self, entries: Sequence[Entry[Question, Answer]]) -> None:
        """Begin to answer. An entry whose adapter is damaged, or that the model cannot be asked, is finished with what it raised."""
        if not self.joins:
            self._whole.join(entries)
            return
        ready = self._with_adapters(entries)
        try:
            self._begin(ready)
        except Exception as error:
            for row in self._batch.lost() if self._batch is not None else ():
                self._entries.pop(row).finish(error)
            if len(ready) == 1:
                ready[0].finish(error)
                ready = []
            for entry in ready:  # one that the model cannot take must not fail its neighbours
                self.join([entry])
        self._count()

    def step(self) -> None:
        if not self.joins:
            self._whole.step()
            return
        assert self._batch is not None
        try:
            answers = self._batch.step()
        except Exception:
            self._entries = {}
            raise
        ended = [(self._entries.pop(row), answer) for row, answer in answers.items()]
        for entry, answer in ended:
            self._learn(entry.item, answer)
        self._count()
        for entry, answer in ended:  # last: whoever waits shares the interpreter with this thread
            entry.finish(answer)

    def leave(self, entries: Sequence[Entry[Question, Answer]]) -> None:
        if not self.joins:
            self._whole.leave(entries)
            return
        assert self._batch is not None
        rows = [row for row, entry in self._entries.items() if entry in entries]
        try:
            self._batch.leave(rows)
        except Exception:
            self._entries = {}
            raise
        for row in rows:
            del self._entries[row]

    def answer(self, questions: list[Question]) -> list[Answer | Exception]:
        """A whole batch at once: answers in order; an exception in the place of each question that failed."""
        assert self._answerer is not None
        results: dict[int, Answer | Exception] = {}
        ready: list[int] = []
        wanted = {q.adapter_digest for q in questions}
        for i, question in enumerate(questions):
            try:
                self._ensure(question, wanted)
                ready.append(i)
            except Exception as error:
                results[i] = error
        results |= self._answer({i: questions[i] for i in ready}) if ready else {}
        for question, result in zip(questions, (results[i] for i in range(len(questions))), strict=True):
            if not isinstance(result, Exception):
                self._learn(question, result)
        self._count()
        return [results[i] for i in range(len(questions))]

    def _answer(self, questions: dict[int, Question]) -> dict[int, Any]:
        assert self._answerer is not None
        try:
            answers = self._answerer.answer([_request(q) for q in questions.values()])
            return dict(zip(questions, answers, strict=True))
        except Exception as error:
            if len(questions) == 1:
                return dict.fromkeys(questions, error)
        # One question that the model cannot take must not fail its neighbours: ask them one by one.
        return {i: self._answer({i: question})[i] for i, question in questions.items()}

    def _begin(self, entries: Sequence[Entry[Question, Answer]]) -> None:
        assert self._batch is not None
        listeners = [entry.tell if entry.on_delta is not None else None for entry in entries]
        rows = self._batch.join([_request(entry.item) for entry in entries], listeners)
        self._entries |= dict(zip(rows, entries, strict=True))

    def _with_adapters(self, entries: Sequence[Entry[Question, Answer]]) -> list[Entry[Question, Answer]]:
        """The entries whose adapter is loaded now; the others are finished with what was wrong."""
        wanted = {entry.item.adapter_digest for entry in [*entries, *self._entries.values()]}
        ready = []
        for entry in entries:
            try:
                self._ensure(entry.item, wanted)
                ready.append(entry)
            except Exception as error:
                entry.finish(error)
        return ready

    def _ensure(self, question: Question, wanted: set[str | None]) -> None:
        """Load the question's adapter; of those that nobody wants now, the longest unused leave while there are too many bytes."""
        digest, folder = question.adapter_digest, question.adapter_folder
        if digest is None or folder is None:
            return
        assert self._answerer is not None
        if digest in self._loaded:
            self._loaded.move_to_end(digest)
            return
        try:
            verify_manifest(folder, digest)
            self._answerer.load_adapter(digest, folder)
        except Exception as error:
            raise AdapterDamaged(digest) from error
        self._loaded[digest] = None
        self.stats.adapter_loads += 1
        held = sum(map(self._answerer.lora.n_bytes, self._loaded))
        for old in [d for d in self._loaded if d not in wanted]:
            if held <= self.settings.adapters_max_bytes:
                break
            held -= self._answerer.lora.n_bytes(old)
            self._answerer.unload_adapter(old)
            del self._loaded[old]
            self.stats.adapter_evictions += 1

    def _learn(self, question: Question, answer: Answer) -> None:
        self.stats.questions += 1
        self.stats.tokens += answer.completion_tokens
        if len(self._image_tokens) < 1000:
            self._image_tokens[_sizes(question)] = answer.prompt_tokens

    def _count(self) -> None:
        assert self._answerer is not None
        self.stats.adapters = len(self._loaded)
        features = self._answerer.vlm.features
        self.stats.feature_hits, self.stats.feature_misses = features.hits, features.misses
        self.stats.adapter_bytes = sum(map(self._answerer.lora.n_bytes, self._loaded))
        if (cache := self._answerer.prefixes) is not None:
            self.stats.prefix_hits, self.stats.prefix_misses = cache.hits, cache.misses
            self.stats.prefix_bytes = cache.n_bytes


def _sizes(question: Question) -> tuple[tuple[int, int], ...]:
    return tuple(image.size for image in question.images)


def _request(q: Question) -> AnswerRequest:
    return AnswerRequest(
        q.images,
        q.text,
        q.adapter_digest,
        q.max_tokens,
        q.temperature,
        q.seed,
        q.grounding,
        q.top_p,
        q.stop,
        q.logprobs,
        q.salt,
    )
