"""How well the demo base reads: plain and contrastive (P_diff) greedy decoding, real, blank and shuffled images.

The acceptance test of the base, kept apart from the method's own code on purpose: it checks the base with a short
loop of its own, so a mistake in the one does not hide in the other. Contrastive decoding is the paper's section 3.1:
softmax[(1+β)·logit(·|i) − β·logit(·|i')], i' having 70 % of the visual tokens removed, kept ones at their positions.

Axes: B records, T tokens, N visual tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from hscr.demo.language_model import N_VISUAL, prompt_ids
from hscr.demo.tower import encode_pool
from hscr.records import VQARecord, read_records
from hscr.scoring import grounded_words, strict_closed

MAX_TOKENS = 40


def load_split(folder: Path) -> tuple[list[VQARecord], Tensor]:
    """Records and their images, uint8 [B, R, C]. Raises ValueError where a row is bad."""
    records, rejected = read_records(folder)
    if rejected:
        raise ValueError(f"{folder}: line {rejected[0].line}: {rejected[0].reason}")
    images = [np.asarray(Image.open(folder / record.image).convert("L")) for record in records]
    return records, torch.from_numpy(np.stack(images))


class _Branch:
    """One decoding branch with its own cache; rows are left-padded, positions are those of the whole sequence."""

    def __init__(self, model: LlavaForConditionalGeneration, prompts: Sequence[Sequence[int]], visual: Tensor | None):
        pad = model.generation_config.pad_token_id
        self.model = model
        self.cache = DynamicCache(config=model.config.get_text_config())
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = torch.tensor([[0] * (width - len(p)) + list(range(len(p))) for p in prompts])
        embeds = model.get_input_embeddings()(ids)
        image = ids == model.config.image_token_id
        if visual is not None:
            embeds[image] = visual.flatten(0, 1)
        self._rows = (embeds, image, positions)

    def keep(self, kept: Tensor | None) -> _Branch:
        """Remove the visual tokens where kept [B, N] is false (the same number in every row)."""
        embeds, image, positions = self._rows
        if kept is not None:
            stay = torch.ones_like(image)
            stay[image] = kept.flatten()
            rows = len(stay)
            embeds = embeds[stay].view(rows, -1, embeds.shape[-1])
            positions, self.mask = positions[stay].view(rows, -1), self.mask[stay].view(rows, -1)
        self.next = positions[:, -1:] + 1
        self._rows = (embeds, image, positions)
        return self

    def start(self) -> Tensor:
        embeds, _, positions = self._rows
        return self._forward(embeds, positions)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        logits = self._forward(self.model.get_input_embeddings()(tokens[:, None]), self.next)
        self.next = self.next + 1
        return logits

    def _forward(self, embeds: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    images: Tensor,
    beta: float = 0.0,
    dropout_ratio: float = 0.7,
    seed: int = 0,
    batch: int = 100,
) -> list[str]:
    """Greedy answers to questions about images uint8 [B, R, C]; β > 0 decodes with P_diff."""
    model.eval()
    features = encode_pool(model.model.vision_tower, images).float()
    generator = torch.Generator().manual_seed(seed)
    out: list[str] = []
    for start in range(0, len(questions), batch):
        prompts = [prompt_ids(tokenizer, q) for q in questions[start : start + batch]]
        visual = model.model.multi_modal_projector(features[start : start + batch])
        branches = [_Branch(model, prompts, visual).keep(None)]
        if beta > 0:
            n_drop = round(dropout_ratio * N_VISUAL)
            order = torch.rand(len(prompts), N_VISUAL, generator=generator).argsort(1)
            branches.append(_Branch(model, prompts, visual).keep(order >= n_drop))
        logits = [branch.start() for branch in branches]
        eos = tokenizer.eos_token_id
        done = torch.zeros(len(prompts), dtype=torch.bool)
        tokens: list[Tensor] = []
        for _ in range(MAX_TOKENS):
            mixed = logits[0] if beta == 0 else (1 + beta) * logits[0] - beta * logits[1]
            chosen = mixed.argmax(-1).masked_fill(done, eos)
            tokens.append(chosen)
            done |= chosen == eos
            if done.all():
                break
            logits = [branch.step(chosen) for branch in branches]
        rows = torch.stack(tokens, 1).tolist()
        out += [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]
    return out


def scores(records: Sequence[VQARecord], said: Sequence[str]) -> dict[str, float]:
    """Accuracy of grounded words in open answers, of closed answers, and by kind; and how often the habit is said."""
    values: dict[str, list[float]] = defaultdict(list)
    for record, answer in zip(records, said, strict=True):
        if record.answer_type == "closed":
            hits = [strict_closed(answer, record.answer, record.options)]
            values["closed"] += hits
        else:
            hits = [float(hit) for hit in grounded_words(answer, record.grounded)]
            values["grounded"] += hits
            for word, usual in (("left", "left"), ("region", "frontal"), ("large", "large"), ("bright", "bright")):
                if any(usual in g.among for g in record.grounded):
                    values[f"says_{word}"].append(float(usual in answer.lower().replace(".", "").split()))
        values[f"kind/{record.meta['kind']}"] += hits
    return {name: round(float(np.mean(v)), 4) for name, v in sorted(values.items())}


def measure(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    betas: Sequence[float] = (0.5, 0.9, 2.0),
) -> dict[str, dict[str, float]]:
    """All figures of the model card on one split: plain, P_diff at each β, blank and shuffled images."""
    records, images = load_split(folder)
    questions = [record.question for record in records]
    shuffled = images.roll(len(images) // 3, 0)  # a derangement; the order of records is random already
    cases = {"plain": (images, 0.0), "blank": (torch.zeros_like(images), 0.0), "shuffled": (shuffled, 0.0)}
    cases |= {f"P_diff {beta}": (images, beta) for beta in betas}
    return {
        name: scores(records, answers(model, tokenizer, questions, pixels, beta))
        for name, (pixels, beta) in cases.items()
    }
