"""Stages 2 and 3 of the demo base: a decoder that learns to read the tower, then habits from text without images.

Stage 2 puts many questions about one slice into one row behind the same 64 visual tokens (a tree mask and positions
that restart after the image make this equal to separate rows), which is what makes it affordable on a CPU. Stage 3
trains on text of a biased world alone, so the model still can read the slice but answers from habit.

Axes: B rows (slices), K questions a row, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from hscr.demo.data import BALANCED, KIND_WEIGHTS, Habits, draw_lesion, draw_marker
from hscr.demo.language import PARTS, Asked, ask, kinds_for
from hscr.demo.language_model import N_VISUAL, answer_ids, prompt_ids
from hscr.demo.slices import Facts, LesionWish, MarkerWish
from hscr.demo.tower import Pool, cosine, fast_precision
from hscr.demo.volumes import PLANES
from hscr.inputs import tree_mask

GROUNDED_WEIGHT = 3.0


def draw_facts(rng: np.random.Generator, habits: Habits = BALANCED) -> Facts:
    """Facts of a slice that nobody rendered: what a text-only corpus talks about."""
    plane = PLANES[int(rng.integers(3))]
    lesion = draw_lesion(rng, habits) if rng.random() < 0.75 else None
    marker = draw_marker(rng, habits) if rng.random() < 0.5 else None
    if plane == "sagittal":
        lesion = LesionWish("", lesion.region, lesion.size, lesion.look) if lesion else None
        marker = MarkerWish("", marker.structure) if marker else None
    seen = frozenset(p for p in PARTS if rng.random() < 0.5)
    return Facts(plane, seen, frozenset(PARTS) - seen, lesion, marker)


def draw_questions(rng: np.random.Generator, facts: Facts, count: int) -> list[Asked]:
    """Some questions about one slice, by KIND_WEIGHTS among the kinds that apply."""
    # A slice at the brain's edge may show no structure clearly; there is then nothing to ask "visible" about.
    kinds = [kind for kind in kinds_for(facts) if kind != "visible" or facts.present]
    weights = np.array([KIND_WEIGHTS[k] for k in kinds], dtype=float)
    drawn = rng.choice(len(kinds), size=count, p=weights / weights.sum())
    return [ask(rng, facts, kinds[i]) for i in drawn]


class Packer:
    """Turns questions into token rows. Segment 0 is the shared prefix; questions are segments 1…K; -1 is padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self._words = {i: str(tokenizer.decode([i])).strip() for i in range(len(tokenizer))}

    def _encoded(self, text: str, question: bool) -> list[int]:
        key = ("q" if question else "a") + text
        if key not in self._ids:
            self._ids[key] = prompt_ids(self.tokenizer, text) if question else answer_ids(self.tokenizer, text)
        return self._ids[key]

    def pack(self, rows: list[list[Asked]], with_image: bool = True) -> dict[str, Tensor]:
        """ids, positions, segments [B, T]; targets [B, T] (-100 but where the next token is an answer's); weights."""
        packed = []
        for asked in rows:
            prefix = self._encoded(asked[0].question, True)[: 2 + N_VISUAL]
            if not with_image:
                prefix = prefix[:2]
            ids, targets, weights = list(prefix), [-100] * len(prefix), [0.0] * len(prefix)
            positions, segments = list(range(len(prefix))), [0] * len(prefix)
            for number, one in enumerate(asked, 1):
                question = self._encoded(one.question, True)[2 + N_VISUAL :]
                answer = self._encoded(one.answer, False)
                words = {word for word, _ in one.grounded}
                body = question + answer[:-1]
                ids += body
                targets += [-100] * (len(question) - 1) + answer
                weights += [0.0] * (len(question) - 1)
                weights += [GROUNDED_WEIGHT if self._words[t] in words else 1.0 for t in answer]
                # Without an image positions start where they would stand behind one, so no shift is learned.
                positions += range(2 + N_VISUAL, 2 + N_VISUAL + len(body))
                segments += [number] * len(body)
            packed.append((ids, positions, segments, targets, weights))
        width = max(len(row[0]) for row in packed)
        fill = (self.tokenizer.pad_token_id, 0, -1, -100, 0.0)
        columns = [torch.tensor([list(row[i]) + [fill[i]] * (width - len(row[i])) for row in packed]) for i in range(5)]
        return dict(zip(("ids", "positions", "segments", "targets", "weights"), columns, strict=True))


def packed_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], features: Tensor | None
) -> tuple[Tensor, float]:
    """Weighted mean cross-entropy of answer tokens, and grounded words' accuracy. features [B, 64, D] of the tower."""
    with fast_precision():
        return _packed_loss(model, batch, features)


def _packed_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], features: Tensor | None
) -> tuple[Tensor, float]:
    embeds = model.get_input_embeddings()(batch["ids"])
    if features is not None:
        visual = model.model.multi_modal_projector(features)
        embeds = torch.cat([embeds[:, :2], visual.float(), embeds[:, 2 + N_VISUAL :]], dim=1)
    seen = tree_mask(batch["segments"])
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    asked = batch["targets"] >= 0
    logits = model.lm_head(hidden[asked]).float()
    targets, weights = batch["targets"][asked], batch["weights"][asked]
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    grounded = weights == GROUNDED_WEIGHT
    return loss, (logits.argmax(-1) == targets)[grounded].float().mean().item()


def train_balanced(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: Pool,
    features: Tensor,
    steps: int,
    seed: int,
    batch: int = 10,
    questions: int = 6,
    lr: float = 1.5e-3,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Stage 2: projector and decoder on balanced questions about the pool's slices; the tower stays frozen.

    Yields (step, means of the last 50 steps).
    """
    rng = np.random.default_rng([seed, 201])
    packer = Packer(tokenizer)
    queue: list[int] = []
    parameters = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    model.train()
    model.model.language_model.set_attn_implementation("eager")
    recent: list[tuple[float, float]] = []
    for step in range(steps):
        if len(queue) < batch:
            queue = rng.permutation(len(pool.facts)).tolist()
        rows, queue = queue[:batch], queue[batch:]
        packed = packer.pack([draw_questions(rng, pool.facts[row], questions) for row in rows])
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, 150)
        loss, accuracy = packed_loss(model, packed, features[rows].float())
        _update(optimizer, parameters, loss)
        recent.append((loss.item(), accuracy))
        if step % 50 == 49 or step + 1 == steps:
            yield step + 1, dict(zip(("loss", "grounded"), np.mean(recent, axis=0).round(4).tolist(), strict=True))
            recent = []
    model.eval()


def train_habits(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    habits: Habits,
    steps: int,
    seed: int,
    batch: int = 8,
    questions: int = 6,
    lr: float = 7e-4,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Stage 3: the decoder alone, on biased text without images."""
    rng = np.random.default_rng([seed, 301])
    packer = Packer(tokenizer)
    parameters = list(model.model.language_model.parameters()) + list(model.lm_head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    model.model.language_model.set_attn_implementation("eager")
    for step in range(steps):
        rows = [draw_questions(rng, draw_facts(rng, habits), questions) for _ in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, 20)
        loss, accuracy = packed_loss(model, packer.pack(rows, with_image=False), None)
        _update(optimizer, parameters, loss)
        if step % 20 == 19 or step + 1 == steps:
            yield step + 1, {"loss": round(loss.item(), 4), "grounded": round(accuracy, 4)}
    model.eval()


def _update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
