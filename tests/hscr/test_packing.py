"""One packed row a record equals a row an answer, in logits and gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hscr.packing
from hscr.config import OptimizationConfig
from hscr.inputs import image_inputs, tree_mask
from hscr.losses import RecordLogProbs, record_loss
from hscr.model import VLM, add_lora, encode_answer, encode_prompts
from hscr.packing import packed_logits, token_logprobs
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.tiny import picture

QUESTIONS = ["Where is the lesion?", "Which plane is shown?", "Is there a lesion?"]
ANSWERS = [
    ["There is a lesion in the left lobe.", "There is a lesion in the right temporal lobe.", "no"],
    ["axial slice", "coronal"],
    ["yes", "no", "This is an axial slice.", "left"],
]


def batch(vlm: VLM, n: int = 3) -> tuple[list[Prompt], list[list[list[int]]]]:
    prompts = encode_prompts(vlm, [picture(i) for i in range(n)], QUESTIONS[:n])
    ids = [[encode_answer(vlm, q, a) for a in group] for q, group in zip(QUESTIONS, ANSWERS, strict=True)][:n]
    return prompts, ids


def row_logits(vlm: VLM, prompt: Prompt, answer: list[int]) -> Tensor:
    """[prompt | y] alone through the stock forward, logits [A, V]."""
    ids = torch.cat([prompt.input_ids, torch.tensor(answer)])[None]
    positions = torch.cat([prompt.position_ids, prompt.next_position + torch.arange(len(answer))])[None]
    out = vlm.model(
        input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), **image_inputs(vlm, [prompt])
    )
    return out.logits[0, len(prompt.input_ids) - 1 : -1]


def largest_difference(vlm: VLM, prompts: list[Prompt], ids: list[list[list[int]]]) -> float:
    with torch.no_grad():
        packed = packed_logits(vlm, prompts, ids)
        return max(
            float((packed[b][j] - row_logits(vlm, prompts[b], answer)).abs().max())
            for b, group in enumerate(ids)
            for j, answer in enumerate(group)
        )


def test_tree_mask_by_hand() -> None:
    """Prompt 2 tokens, answers of 2 and 1, one padding column: each answer sees the prompt and itself, padding sees itself."""
    mask = tree_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [1, 3])
def test_packed_logits_equal_separate_rows(vlm: VLM, attention: str, n: int) -> None:
    vlm.model.set_attn_implementation(attention)
    assert largest_difference(vlm, *batch(vlm, n)) < 3e-5


def test_packed_logits_of_dropped_prompts_equal_separate_rows(vlm: VLM) -> None:
    prompts, ids = batch(vlm)
    assert largest_difference(vlm, [dropped(p, 0.7, i, 0) for i, p in enumerate(prompts)], ids) < 3e-5


def test_a_missing_tree_mask_is_noticed(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: with a plain causal mask the second answer reads the first."""

    def causal(segments: Tensor) -> Tensor:
        t = segments.shape[1]
        return torch.ones(len(segments), 1, t, t, dtype=torch.bool).tril()

    monkeypatch.setattr("hscr.packing.tree_mask", causal)
    assert largest_difference(vlm, *batch(vlm)) > 0.1


def test_positions_restarted_wrongly_are_noticed(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, ids = batch(vlm, 1)
    with torch.no_grad():
        rows = [row_logits(vlm, prompts[0], answer) for answer in ids[0]]
        monkeypatch.setattr(Prompt, "next_position", property(lambda self: int(self.position_ids[-1]) + 4))
        packed = packed_logits(vlm, prompts, ids)[0]
    assert max(float((p - r).abs().max()) for p, r in zip(packed, rows, strict=True)) > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_give_no_nan_and_change_nothing(vlm: VLM, attention: str) -> None:
    vlm.model.set_attn_implementation(attention)
    prompts, ids = batch(vlm)
    together = packed_logits(vlm, prompts, ids)
    for b in range(3):
        alone = packed_logits(vlm, prompts[b : b + 1], ids[b : b + 1])[0]
        for left, right in zip(together[b], alone, strict=True):
            assert left.isfinite().all()
            torch.testing.assert_close(left, right, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_the_packed_loss_equal_those_of_separate_rows(
    vlm: VLM, attention: str, checkpointing: bool
) -> None:
    """The same multi-level loss over a padded batch; LoRA B is filled, for at zero no gradient reaches A."""
    vlm.model.set_attn_implementation(attention)
    config = OptimizationConfig(lora_rank=2, anchor=1.0)
    add_lora(vlm, config, seed=0)
    parameters = {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in parameters.items():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    prompts, ids = batch(vlm)

    def loss_of(logits: list[list[Tensor]]) -> Tensor:
        losses = []
        for rows, group in zip(logits, ids, strict=True):
            sums = torch.stack([token_logprobs(r, a).sum() for r, a in zip(rows, group, strict=True)])
            record = RecordLogProbs(
                sums, torch.full_like(sums, -20.0).detach(), torch.tensor([float(len(a)) for a in group])
            )
            losses.append(record_loss(record, config)[0])
        return torch.stack(losses).mean()

    def gradients(logits: list[list[Tensor]]) -> dict[str, Tensor]:
        vlm.model.zero_grad()
        loss_of(logits).backward()
        return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}

    plain = gradients([[row_logits(vlm, p, a) for a in group] for p, group in zip(prompts, ids, strict=True)])
    if checkpointing:
        vlm.model.train()
        vlm.base.activation_checkpointing_enable({"use_reentrant": False})
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 0.1
    # In float32 each is 1e-6 to 4e-6 of the largest gradient from float64; the second rounds weights with the adapter in them.
    default = partial(hscr.packing.answer_logits, checkpointing=checkpointing)
    for route, tolerance in ((packed_logits, 2e-6), (default, 4e-6)):
        packed = gradients(route(vlm, prompts, ids))
        assert plain.keys() == packed.keys() == parameters.keys()
        for name, gradient in plain.items():
            assert float((gradient - packed[name]).abs().max()) < tolerance * max(1.0, largest), name


def test_token_logprobs_by_hand() -> None:
    """Logits (0, ln 3): p = (1/4, 3/4). Computed in float32 also from half precision."""
    logits = torch.tensor([[0.0, 1.0986123], [0.0, 1.0986123]])
    assert token_logprobs(logits, [0, 1]).tolist() == pytest.approx([-1.3862944, -0.2876821], abs=1e-6)
    assert token_logprobs(logits.bfloat16(), [0, 1]).dtype == torch.float32


def test_long_answers_get_a_row_each_and_short_ones_a_tree(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers of T tokens after n: a tree hides 2 T² pairs, expanding copies 2 n tokens; equal at T = 8 √n."""
    prompts, _ = batch(vlm)
    most = [math.isqrt(64 * len(p.input_ids)) for p in prompts]
    took: list[Any] = []

    def noting(name: str) -> Callable[..., list[list[Tensor]]]:
        def route(vlm: VLM, prompts: list[Prompt], answers: list[list[list[int]]]) -> list[list[Tensor]]:
            took.append((name, [len(group[0]) for group in answers]))
            return [[torch.tensor(len(a)) for a in group] for group in answers]

        return route

    monkeypatch.setattr(hscr.packing.AdaptedDecoder, "of", lambda vlm: None)  # a decoder that is not plain
    for name in ("row_logits", "tree_logits", "packed_logits"):
        monkeypatch.setattr(hscr.packing, name, noting(name))
    answers = [[[5] * most[0]] * 2, [[5] * (most[1] + 1)] * 2]
    found = hscr.packing.answer_logits(vlm, prompts[:2], answers)
    assert took == [("row_logits", [most[1] + 1]), ("tree_logits", [most[0]])]
    assert [[int(x) for x in group] for group in found] == [[len(a) for a in group] for group in answers]
    hscr.packing.answer_logits(vlm, prompts[1:2], answers[1:], checkpointing=True)
    assert took[2:] == [("packed_logits", [most[1] + 1])]
