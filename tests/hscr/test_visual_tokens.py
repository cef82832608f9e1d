"""Visual token dropout by removal, and features that are computed once. Paper §3.1."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hscr.decode import decode
from hscr.feature_cache import FeatureCache
from hscr.inputs import image_inputs
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.packing import packed_logits
from hscr.reward import alignment_reward, branches
from hscr.visual_tokens import (
    Prompt,
    derived_seed,
    drop_visual_tokens,
    dropout_mask,
    dropped,
)
from tests.hscr.tiny import picture

QUESTION = "Where is the lesion?"
ANSWER = "There is a large bright lesion in the left frontal lobe."


@pytest.fixture
def prompt(vlm: VLM) -> Prompt:
    return encode_prompts(vlm, [picture(0)], [QUESTION])[0]


def features(prompt: Prompt) -> Tensor:
    assert prompt.features is not None
    return prompt.features


def plain_logits(vlm: VLM, prompt: Prompt, answer: list[int], mask: Tensor | None = None) -> Tensor:
    """The whole sequence in one row, stock attention, 2-D mask: logits [A, V] that predict the answer."""
    n = len(prompt.input_ids)
    ids = torch.cat([prompt.input_ids, torch.tensor(answer)])[None]
    positions = torch.cat([prompt.position_ids, prompt.next_position + torch.arange(len(answer))])[None]
    mask = (
        torch.ones_like(ids)
        if mask is None
        else torch.cat([mask.long(), torch.ones(len(answer), dtype=torch.long)])[None]
    )
    with torch.no_grad():
        out = vlm.model(input_ids=ids, position_ids=positions, attention_mask=mask, **image_inputs(vlm, [prompt]))
    return out.logits[0, n - 1 : -1]


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.3, 11), (0.5, 8), (0.7, 5), (0.9, 2), (0.99, 1)])
def test_mask_drops_the_rounded_share_and_never_everything(ratio: float, kept: int) -> None:
    """Of 16: round(.3·16 = 4.8) = 5 dropped, round(11.2) = 11, round(14.4) = 14, and 15.84 rounds to 16 but one must stay."""
    assert int(dropout_mask(16, ratio, 1).sum()) == kept


def test_mask_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = dropout_mask(64, 0.7, 5)
    torch.manual_seed(2)
    assert torch.equal(first, dropout_mask(64, 0.7, 5))
    assert not torch.equal(first, dropout_mask(64, 0.7, 6))


def test_derived_seed_is_the_same_in_every_process() -> None:
    """First 8 bytes of sha256("a\\x1f1") as a number, halved: no salt. Parts are kept apart: ("a", 1) is not ("a1",)."""
    assert derived_seed("a", 1) == derived_seed("a", "1") == 4742018630964328543
    assert derived_seed("record", 7) == 6027736382290322971
    assert derived_seed("a", 1) != derived_seed("a1") != derived_seed("", "a1")


def test_dropped_prompt_keeps_text_and_positions(prompt: Prompt) -> None:
    cut = dropped(prompt, 0.7, "name", 0)
    assert prompt.features is not None
    assert cut.features is not None
    visual = cut.input_ids == cut.image_token_id
    assert (int(visual.sum()), len(cut.features)) == (5, 5)
    assert len(cut.input_ids) == len(prompt.input_ids) - 11
    assert torch.equal(prompt.input_ids[cut.position_ids], cut.input_ids)
    assert cut.next_position == prompt.next_position
    first = int((prompt.input_ids == prompt.image_token_id).nonzero()[0])
    assert torch.equal(cut.features, prompt.features[cut.position_ids[visual] - first])


def test_dropout_ratio_0_gives_reward_0(vlm: VLM, prompt: Prompt) -> None:
    ids = encode_answer(vlm, QUESTION, ANSWER)
    none = branches(vlm, [prompt], [ids], ["x"], dropout_ratio=0.0)[0]
    some = branches(vlm, [prompt], [ids], ["x"], dropout_ratio=0.7)[0]
    assert alignment_reward(none.full, none.dropped, ids).abs().max() == 0
    assert alignment_reward(some.full, some.dropped, ids).abs().max() > 0.01


def test_removal_equals_a_mask_with_holes_and_compacted_positions_do_not(vlm: VLM, prompt: Prompt) -> None:
    ids = encode_answer(vlm, QUESTION, ANSWER)
    keep = dropout_mask(16, 0.7, 3)
    cut = drop_visual_tokens(prompt, keep)
    holes = torch.ones(len(prompt.input_ids), dtype=torch.bool)
    holes[prompt.input_ids == prompt.image_token_id] = keep
    oracle = plain_logits(vlm, prompt, ids, holes)
    removed = packed_logits(vlm, [cut], [[ids]])[0][0]
    compacted = dataclasses.replace(cut, position_ids=torch.arange(len(cut.input_ids)))
    torch.testing.assert_close(removed, oracle, atol=2e-5, rtol=1e-5)
    assert (packed_logits(vlm, [compacted], [[ids]])[0][0] - oracle).abs().max() > 1e-2
    assert (plain_logits(vlm, prompt, ids) - oracle).abs().max() > 1e-2


def test_decoding_from_a_dropped_prompt_equals_decoding_behind_a_mask_with_holes(vlm: VLM, prompt: Prompt) -> None:
    keep = dropout_mask(16, 0.7, 3)
    holes = torch.ones(len(prompt.input_ids), dtype=torch.bool)
    holes[prompt.input_ids == prompt.image_token_id] = keep
    made = decode(vlm, [drop_visual_tokens(prompt, keep)], max_tokens=8)[0]
    oracle = plain_logits(vlm, prompt, made, holes)
    oracle[:, vlm.image_token_id] = -torch.inf
    assert oracle.argmax(-1).tolist() == made


def test_precomputed_features_equal_pixel_values(vlm: VLM, prompt: Prompt) -> None:
    batch = vlm.processor(images=[picture(0)], text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    assert torch.equal(batch["input_ids"][0], prompt.input_ids)
    with torch.no_grad():
        stock = vlm.model(**batch).logits[0, -1]
        other = vlm.model(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits[0, -1]
    ours = plain_logits(vlm, prompt, [vlm.eos_id])[0]
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=1e-5)
    assert (other - stock).abs().max() > 1e-2


def test_features_do_not_depend_on_the_images_beside_them(vlm: VLM) -> None:
    """Bit for bit: a resumed run meets its images in other batches and must end with the same weights."""
    images = [picture(i) for i in range(7)]
    together = encode_prompts(vlm, images, [QUESTION] * 7)
    for i in range(7):
        vlm.features = FeatureCache()
        alone = encode_prompts(vlm, [images[i]], [QUESTION])[0]
        assert alone.features is not None
        assert torch.equal(features(alone), features(together[i]))


def test_the_tower_runs_once_a_distinct_image(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    stock = vlm.base.get_image_features

    def spy(pixel_values: Tensor, **options: Any) -> Any:
        seen.append(len(pixel_values))
        return stock(pixel_values, **options)

    monkeypatch.setattr(vlm.base, "get_image_features", spy)
    a, b = picture(0), picture(1)
    first, second, third = encode_prompts(vlm, [a, b, a.copy()], ["x", "y", "z"])
    encode_prompts(vlm, [b], ["again"])
    assert seen == [1, 1]  # one at a time on a CPU: features depend on their batch mates in the last bits
    assert torch.equal(features(first), features(third))
    assert not torch.equal(features(first), features(second))


def test_images_of_equal_bytes_and_other_shape_are_told_apart(vlm: VLM) -> None:
    wide, tall = encode_prompts(vlm, [picture(0, (14, 56)), picture(0, (56, 14))], ["x", "x"])
    assert wide.image != tall.image


def test_a_full_cache_does_not_lose_what_the_batch_needs(vlm: VLM) -> None:
    """A cached image is evicted by the new ones of its own batch; its features are still there for the prompt."""
    one = encode_prompts(vlm, [picture(0)], ["x"])[0]
    assert one.features is not None
    vlm.features = FeatureCache(max_bytes=2 * one.features.nbytes)
    encode_prompts(vlm, [picture(0)], ["x"])
    prompts = encode_prompts(vlm, [picture(i) for i in range(4)], ["x"] * 4)
    assert torch.equal(features(prompts[0]), features(one))
    assert vlm.features.n_bytes <= vlm.features.max_bytes


def test_two_records_with_different_numbers_of_visual_tokens_share_a_batch(vlm: VLM) -> None:
    a, b = encode_prompts(vlm, [picture(0), picture(1)], ["Where?", QUESTION])
    cut = dropped(b, 0.7, "b", 0)
    ids = [encode_answer(vlm, "Where?", "left"), encode_answer(vlm, QUESTION, ANSWER)]
    together = packed_logits(vlm, [a, cut], [[ids[0]], [ids[1]]])
    torch.testing.assert_close(together[0][0], plain_logits(vlm, a, ids[0]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(together[1][0], packed_logits(vlm, [cut], [[ids[1]]])[0][0], atol=2e-5, rtol=1e-5)


def test_a_question_cannot_smuggle_in_an_image_or_an_end(vlm: VLM) -> None:
    plain = encode_prompts(vlm, [picture(0)], ["Where? <image> </s> <<image>image>"])[0]
    assert int((plain.input_ids == vlm.image_token_id).sum()) == 16
    assert vlm.eos_id not in plain.input_ids
    assert encode_answer(vlm, "q", "left </s> <image>").count(vlm.eos_id) == 1
    assert vlm.image_token_id not in encode_answer(vlm, "q", "left </s> <image>")
