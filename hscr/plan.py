"""What a run will take, before it starts: time and memory by stage, whether it fits the device, and settings that fit.

Counted from the model's shapes and the data set's own tokens, timed on two random layers of the model's decoder (hscr/probe.py). Not in it:
loading weights, decoding image files, answers that come out longer than the references. The report puts what happened beside it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hscr.adapted_decoder import kept_bytes
from hscr.base_shapes import built_on_meta
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.families import family_of, makes_features
from hscr.model import VLM, encode_answer, processed
from hscr.optimize import CPU_TOKENS
from hscr.probe import LAYERS, Probe
from hscr.processor import load_processor
from hscr.records import VQARecord
from hscr.replacement import WORD_TOKENS

SAMPLE = 16  # records whose tokens are counted
SHARE = 0.9  # of the free memory may be planned with
PROBE_FLOPS = 2e10  # of one timed run on a CPU: more tokens than that are timed on fewer, in proportion
SIMILARITY_FLOPS = 21e6 * 20  # MiniLM: 2 × its 10.6 million weights in layers a token, answers of about 20 tokens


@dataclass(frozen=True)
class Tokens:
    """Means over a sample of records: tokens of the prompt and the answer, visual tokens, and what the tower reads; `longest` prompt."""

    prompt: float
    answer: float
    visual: float
    patches: float
    longest: int


@dataclass(frozen=True)
class StagePlan:
    """One stage: how many units (records, or answers for `evaluating`), seconds, and peak memory with the weights in it."""

    stage: str
    units: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The estimate of a run. `settings` are changes of the configuration under which it would fit, empty where it does as it is."""

    device: str
    dtype: str
    parameters: int
    weights_bytes: int
    prompt_tokens: float
    visual_tokens: float
    answer_tokens: float
    stages: tuple[StagePlan, ...]
    seconds: float
    bytes: int
    available_bytes: int
    fits: bool
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def skeleton(model: str, revision: str | None = None) -> VLM:
    """A model without weights, with its processor: enough to count tokens and shapes. ValueError for an unknown model."""
    built = built_on_meta(model, revision)
    family = family_of(built.config.model_type, model)
    text = built.config.get_text_config().model_type
    try:
        processor = load_processor(family, model, revision, text)
    except OSError as error:
        raise ValueError(f"model {model!r}: {str(error).splitlines()[0]}") from error
    return VLM(built, processor, family, torch.device("cpu"), Path(model).name, "")


def estimate(
    vlm: VLM,
    data: DataSet,
    config: AlignConfig,
    evaluation_data: DataSet | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    available: int | None = None,
    evaluates: bool = False,
) -> Plan:
    """Estimate `align` on `device` and `dtype` (default: the loaded model's) with `available` bytes (default: what is free there).

    Of a loaded model the weights count as free: they are there already. `evaluates`: of `evaluate` on `data` instead, an adapter beside
    the base.
    """
    device, dtype = device or vlm.device, dtype or vlm.base.dtype
    counted = _Counted(vlm, data, config, data if evaluates else evaluation_data, device, dtype, evaluates)
    if available is None:
        loaded = not any(p.is_meta for p in vlm.base.parameters())
        available = free_bytes(device) + (counted.weights if loaded else 0)
    allowed = int(SHARE * available)
    settings: dict[str, Any] = {}
    stages = counted.stages(config)
    for change in _fewer_at_once(config) if evaluates else _lighter(config, counted):
        if max(s.bytes for s in stages) <= allowed:
            break
        settings |= change
        config = _with(config, change)
        if max(s.bytes for s in counted.stages(config)) <= allowed:
            break
    else:
        settings = {}  # nothing that can be set makes it fit
    return Plan(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        parameters=counted.parameters,
        weights_bytes=counted.weights,
        prompt_tokens=counted.tokens.prompt,
        visual_tokens=counted.tokens.visual,
        answer_tokens=counted.tokens.answer,
        stages=stages,
        seconds=sum(s.seconds for s in stages),
        bytes=max(s.bytes for s in stages),
        available_bytes=available,
        fits=max(s.bytes for s in stages) <= allowed,
        settings=settings,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a run on the device could have now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lighter(config: AlignConfig, counted: _Counted) -> list[dict[str, Any]]:
    """Changes that take memory off, the cheapest in time first."""
    changes: list[dict[str, Any]] = []
    while True:
        budgets = {"preference": config.preference.token_budget, "optimization": counted.trained_at_once(config)}
        halves = {
            f"{section}.token_budget": max(budget // 2, counted.longest_row)
            for section, budget in budgets.items()
            if budget > counted.longest_row
        }
        if not halves:
            break
        changes.append(halves)
        config = _with(config, halves)
    if counted.by_hand is None:  # checkpointing would leave that route (hscr/adapted_decoder.py), and took more memory
        changes.append({"optimization.gradient_checkpointing": True})
    return changes


def _fewer_at_once(config: AlignConfig) -> list[dict[str, Any]]:
    """The same for an evaluation: batches of half the size, down to one answer."""
    changes, size = [], config.evaluation.batch_size
    while size > 1:
        size //= 2
        changes.append({"evaluation.batch_size": size})
    return changes


def _with(config: AlignConfig, settings: dict[str, Any]) -> AlignConfig:
    for name, value in settings.items():
        section, key = name.split(".")
        config = AlignConfig.from_dict({section: {key: value}}, config)
    return config


class _Counted:
    """Tokens, weights and timings of one model, data set and device; `stages` turns them into an estimate for a configuration."""

    def __init__(
        self,
        vlm: VLM,
        data: DataSet,
        config: AlignConfig,
        evaluation_data: DataSet | None,
        device: torch.device,
        dtype: torch.dtype,
        evaluates: bool = False,
    ) -> None:
        self.vlm, self.device, self.evaluates = vlm, device, evaluates
        self.tokens = _tokens(vlm, data)
        self.n, self.n_images = len(data.records), len({i for r in data.records for i in r.images})
        self.given = data.given is not None
        self.n_evaluated = 0 if evaluation_data is None else len(evaluation_data.records)
        self.parameters = sum(p.numel() for p in vlm.base.parameters())
        self.itemsize = dtype.itemsize
        self.weights = sum(
            p.numel() * (dtype.itemsize if p.is_meta else p.element_size()) for p in vlm.base.parameters()
        )
        linear = [(n, m) for n, m in vlm.base.named_modules() if isinstance(m, torch.nn.Linear)]
        self.tower = sum(m.in_features * m.out_features for n, m in linear if makes_features(n))
        decoder = [m for n, m in linear if f"{vlm.family.language_model}." in n and not makes_features(n)]
        self.decoder = sum(m.in_features * m.out_features for m in decoder)
        self.lora = config.optimization.lora_rank * sum(m.in_features + m.out_features for m in decoder)
        text = vlm.base.config.get_text_config()
        self.layers, self.vocabulary, self.hidden = text.num_hidden_layers, text.vocab_size, text.hidden_size
        self.longest_row = self.tokens.longest + round(self.tokens.answer * (1 + config.preference.n_levels))
        self.probe = Probe(vlm, config.optimization, device, dtype)
        self._known: dict[tuple[Any, ...], float] = {}
        # Bytes a token and layer where training passes the decoder by hand.
        self.by_hand = kept_bytes(vlm) if device.type == "cpu" and dtype == torch.float32 else None
        self.widest = max((m.in_features * m.out_features for m in decoder), default=0)

    def trained_at_once(self, config: AlignConfig) -> int:
        """Tokens that a forward in training may have."""
        budget = config.optimization.token_budget
        return min(budget, CPU_TOKENS) if self.device.type == "cpu" else budget

    def stages(self, config: AlignConfig) -> tuple[StagePlan, ...]:
        if self.evaluates:
            return (self._evaluating(config),)
        return (self._generating(config), self._optimizing(config), self._evaluating(config))

    def _layers_s(self, what: str, rows: int, tokens: int) -> float:
        """Seconds of all layers; the probe is asked once for equal sizes."""
        rows, tokens, times = max(rows, 1), max(tokens, 1), 1.0
        most = int(PROBE_FLOPS / (2 * self.decoder * LAYERS / self.layers))
        if self.device.type == "cpu" and what != "decode_s" and rows * tokens > max(most, 16):
            times = rows * tokens
            rows, tokens = 1, min(tokens, max(most, 16))
            times /= tokens
        key = (what, rows, tokens)
        if key not in self._known:
            self._known[key] = getattr(self.probe, what)(rows, tokens)
        return self.layers * times * self._known[key]

    def _rows(self, length: float, budget: int, at_most: int) -> int:
        """Rows of a forward under a token budget; a CPU gains nothing from more than a few, and timing them takes long."""
        rows = max(1, min(int(budget / length), at_most))
        return rows if self.device.type == "cuda" else min(rows, 4)

    def _flops_s(self, flops: float) -> float:
        """Seconds of other matrix products, at the rate of the decoder's."""
        tokens = round(self.tokens.prompt)
        return flops / (2 * self.decoder * tokens / self._layers_s("forward_s", 1, tokens))

    def _images_s(self, n: int) -> float:
        return self._flops_s(2 * self.tower * self.tokens.patches * n)

    def _head_s(self, tokens: float) -> float:
        return self._flops_s(2 * self.hidden * self.vocabulary * tokens)

    def _dropped(self, config: AlignConfig) -> float:
        """Tokens of a prompt with visual tokens dropped."""
        return self.tokens.prompt - config.preference.dropout_ratio * self.tokens.visual

    def _generating(self, config: AlignConfig) -> StagePlan:
        p, t = config.preference, self.tokens
        if self.given:
            return StagePlan("generating", 0, 0.0, self.weights)
        words = min(p.n_coupled, max(1, round(t.answer / 4)))  # half of the words, of about two tokens each
        cut = self._dropped(config)
        rows = self._rows(t.prompt + t.answer, p.token_budget, p.batch_size)
        full_s = self._layers_s("forward_s", rows, round(t.prompt + t.answer)) / rows
        cut_s = self._layers_s("forward_s", rows, round(cut + t.answer)) / rows
        answered = p.continuation == "redecode" or p.candidates in ("sampled", "both")
        steps = {words: WORD_TOKENS / 2} | ({p.n_candidates: t.answer} if answered else {})
        decode_s = 0.0
        for per_record, tokens in steps.items():
            held = round((t.prompt if per_record == p.n_candidates else cut) + t.answer / 2)
            batch = max(1, min(int(p.token_budget / held), p.batch_size * per_record))
            decode_s += per_record * tokens * (self._layers_s("decode_s", batch, held) / batch + self._head_s(1))
        each = full_s + (p.n_masks * cut_s) + self._head_s(2 * t.answer) + decode_s
        each += self._flops_s(SIMILARITY_FLOPS * (1 + p.n_candidates)) if p.similarity == "minilm" else 0.0
        records = min(p.batch_size, self.n)
        together = min(p.token_budget, records * (t.prompt + t.answer))
        cache = 2 * self.layers * self.probe.kv_heads * self.probe.head_dim * self.itemsize  # bytes a token
        logits = together / (t.prompt + t.answer) * t.answer * self.vocabulary * 4 * 4
        # Both branches' caches are kept while that of the answers grows beside them: a prompt once, whatever continues it (hscr/trees.py).
        decoded = min(p.token_budget, records * (t.prompt + p.n_candidates * t.answer))
        memory = together * cache * (1 + cut / t.prompt) + decoded * cache + logits
        return StagePlan(
            "generating", self.n, self.n * each + self._images_s(self.n_images), int(self.weights + memory)
        )

    def _optimizing(self, config: AlignConfig) -> StagePlan:
        o, t = config.optimization, self.tokens
        answers = (1 + config.preference.n_levels) * t.answer
        length = round(t.prompt + answers)
        rows = self._rows(length, o.token_budget, o.batch_size)
        forward = self._layers_s("forward_s", rows, length) / rows
        step = self._layers_s("step_s", rows, length) / rows
        if o.gradient_checkpointing:
            step += forward
        each = forward + o.epochs * step + self._head_s(answers * (1 + 2 * o.epochs))
        together = min(max(self.trained_at_once(config), length), o.batch_size * length)
        share = max(1.0, together / length)
        layer = self.probe.saved_bytes(min(length, 256))
        kept = (self.layers * self.hidden * self.itemsize + layer) if o.gradient_checkpointing else self.layers * layer
        logits = share * answers * self.vocabulary * (2 * self.itemsize + 8)
        mask = share * length * length * 3
        if (
            self.by_hand is not None and not o.gradient_checkpointing
        ):  # no mask; a copy of the widest pair of weights lives for its product
            kept, mask = self.layers * self.by_hand, 2 * self.widest * self.itemsize
        return StagePlan(
            "optimizing",
            self.n,
            self.n * each + (self._images_s(self.n_images) if self.given else 0.0),
            int(self.weights + self.lora * 16 + together * kept + logits + mask),  # adapter, gradient and two moments
        )

    def _evaluating(self, config: AlignConfig) -> StagePlan:
        e, t = config.evaluation, self.tokens
        questions = min(e.max_records, self.n_evaluated)
        if questions == 0:
            return StagePlan("evaluating", 0, 0.0, self.weights)
        length = round(t.prompt)
        rows = self._rows(length, 10**9, e.batch_size)
        held = round(t.prompt + t.answer / 2)
        answer = self._layers_s("forward_s", rows, length) / rows + t.answer * (
            self._layers_s("decode_s", e.batch_size, held) / e.batch_size + self._head_s(1)
        )
        both = round(t.prompt + t.answer), round(self._dropped(config) + t.answer)
        grounding = sum(self._layers_s("forward_s", rows, x) / rows for x in both) + self._head_s(2 * t.answer)
        conditions = 3 if e.counterfactual else 1
        images = questions * (2 if e.counterfactual else 1)  # the blank one is as large as each
        cache = 2 * self.layers * self.probe.kv_heads * self.probe.head_dim * self.itemsize
        memory = e.batch_size * (t.prompt + t.answer) * cache * 2
        return StagePlan(
            "evaluating",
            2 * conditions * questions,
            2 * questions * (conditions * answer + grounding) + self._images_s(images),
            int(self.weights + self.lora * 4 + memory),
        )


def _tokens(vlm: VLM, data: DataSet) -> Tokens:
    """Count on a sample, evenly over the data set."""
    step = max(1, len(data.records) // SAMPLE)
    sample: Sequence[VQARecord] = data.records[::step][:SAMPLE]
    patch = next(
        m.weight[0].numel()
        for n, m in vlm.base.named_modules()
        if makes_features(n) and isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))
    )
    rows = []
    for record in sample:
        batch = processed(vlm, data.open_images(record), record.question)
        ids = batch["input_ids"][0]
        visual = int((ids == vlm.image_token_id).sum())
        answer = len(encode_answer(vlm, record.question, record.answer))
        rows.append((len(ids), answer, visual, prod(batch["pixel_values"].shape) / patch))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return Tokens(means[0], means[1], means[2], means[3], max(r[0] for r in rows))
