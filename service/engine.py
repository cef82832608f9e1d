"""The local engine: the only module of the API that loads torch, and only when its `load` runs, in the thread that then owns the device.

Adapters are loaded when first asked for, by digest, after their files were checked; the least recently used ones leave.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hscr.artifacts import verify_manifest
from service.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from hscr.answer import Answerer
    from hscr.answers import Answer
    from hscr.chat import Turn

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


class LocalEngine:
    """transformers + peft. Not thread-safe: the batcher's thread calls `load` once and then `answer`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model_digest: str | None = None
        self.several_images = False  # whether the model's family takes several images a prompt; known after `load`
        self._answerer: Answerer | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()

    def load(self) -> None:
        import torch

        from hscr.answer import Answerer
        from hscr.model import load_model

        torch.set_num_threads(self.settings.engine_threads)
        s = self.settings
        features = None if s.features_folder == "off" else Path(s.features_folder)
        vlm = load_model(
            s.model_path, dtype=s.dtype, device=s.device, revision=s.model_revision, feature_cache=features
        )
        self._answerer = Answerer(vlm)
        self.model_digest = vlm.digest
        self.several_images = vlm.family.several_images
        log.info("model %s loaded, digest %s", s.model_id, vlm.digest)

    def answer(self, questions: list[Question]) -> list[Answer | Exception]:
        """Answers in order; an exception in the place of each question that failed."""
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
        return [results[i] for i in range(len(questions))]

    def _answer(self, questions: dict[int, Question]) -> dict[int, Any]:
        from hscr.answers import AnswerRequest

        assert self._answerer is not None
        requests = [
            AnswerRequest(
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
            for q in questions.values()
        ]
        try:
            return dict(zip(questions, self._answerer.answer(requests), strict=True))
        except Exception as error:
            if len(questions) == 1:
                return dict.fromkeys(questions, error)
        # One question that the model cannot take must not fail its neighbours: ask them one by one.
        return {i: self._answer({i: question})[i] for i, question in questions.items()}

    def _ensure(self, question: Question, wanted: set[str | None]) -> None:
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
        for old in [d for d in self._loaded if d not in wanted][
            : max(0, len(self._loaded) - self.settings.adapters_max)
        ]:
            self._answerer.unload_adapter(old)
            del self._loaded[old]
