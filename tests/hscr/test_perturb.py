"""The four perturbations: how much each hides, that it is the named thing that is hidden, and seeds. Paper §3.1 and its ablation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hscr.config import PERTURBATIONS
from hscr.feature_cache import FeatureCache
from hscr.model import VLM, encode_answer, encode_prompts, load_model
from hscr.perturb import masked_image, perturbed
from hscr.reward import Branches, contrast, token_rewards
from hscr.visual_tokens import Prompt, derived_seed, dropout_mask
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import save_tiny

QUESTIONS = ["Where is the lesion?", "Which plane is shown?"]
ANSWER = "There is a large bright lesion in the left frontal lobe."


class Pair:
    """Two prompts with the pictures (no pixel of them black) and names they were made of."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.images = [picture(i).point(lambda v: max(v, 1)) for i in range(2)]
        self.prompts = encode_prompts(vlm, self.images, QUESTIONS)
        self.names = ["1/a", "1/b"]

    def hide(self, kind: str, ratio: float, mask: int = 0, **changes: Any) -> list[Prompt]:
        names = changes.get("names", self.names)
        return perturbed(self.vlm, self.prompts, self.images, QUESTIONS, names, kind=kind, ratio=ratio, mask=mask)

    def contrast(self, kind: str, ratio: float, n_masks: int = 1) -> list[Branches]:
        answers = [encode_answer(self.vlm, q, ANSWER) for q in QUESTIONS]
        return contrast(self.vlm, self.prompts, [self.hide(kind, ratio, m) for m in range(n_masks)], answers)


@pytest.fixture
def pair(vlm: VLM) -> Pair:
    return Pair(vlm)


def features(prompt: Prompt) -> torch.Tensor:
    assert prompt.features is not None
    return prompt.features


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("reward", ["signed", "abs", "js"])
def test_ratio_0_gives_reward_exactly_0_and_the_papers_ratio_does_not(pair: Pair, kind: str, reward: str) -> None:
    ids = encode_answer(pair.vlm, QUESTIONS[0], ANSWER)
    assert token_rewards(pair.contrast(kind, 0.0)[0], ids, reward).abs().max() == 0
    assert token_rewards(pair.contrast(kind, 0.7)[0], ids, reward).abs().max() > 0.01


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_masks_are_named_by_name_and_number_and_averaged_in_log_probability(pair: Pair, kind: str) -> None:
    one, again = pair.contrast(kind, 0.7), pair.contrast(kind, 0.7)
    assert torch.equal(one[0].dropped, again[0].dropped)
    second = pair.hide(kind, 0.7, mask=1)
    assert not torch.equal(features(pair.hide(kind, 0.7)[0]), features(second[0]))
    assert not torch.equal(features(pair.hide(kind, 0.7)[0]), features(pair.hide(kind, 0.7, names=["1/x", "1/b"])[0]))
    answers = [encode_answer(pair.vlm, q, ANSWER) for q in QUESTIONS]
    alone = contrast(pair.vlm, pair.prompts, [second], answers)
    both = pair.contrast(kind, 0.7, n_masks=2)
    for first, other, mean in zip(one, alone, both, strict=True):
        torch.testing.assert_close(mean.dropped, (first.dropped + other.dropped) / 2)


def test_token_dropout_removes_and_latent_mask_keeps_the_tokens_with_zeroed_features(pair: Pair) -> None:
    """16 visual tokens, ρ = .7: round(11.2) = 11 hidden. Both hide the same ones, because the seed is the same."""
    (removed, _), (zeroed, _) = pair.hide("token_dropout", 0.7), pair.hide("latent_mask", 0.7)
    assert len(features(removed)) == 5
    assert torch.equal(zeroed.input_ids, pair.prompts[0].input_ids)
    hidden = (features(zeroed) == 0).all(dim=1)
    assert int(hidden.sum()) == 11
    assert torch.equal(features(zeroed)[~hidden], features(removed))


def test_pictures_masks_leave_the_text_and_the_number_of_tokens_alone(pair: Pair) -> None:
    for kind in ("patch_mask", "pixel_mask"):
        for prompt, cut in zip(pair.prompts, pair.hide(kind, 0.7), strict=True):
            assert torch.equal(prompt.input_ids, cut.input_ids)
            assert torch.equal(prompt.position_ids, cut.position_ids)
            assert not torch.equal(features(prompt), features(cut))


def test_patch_mask_blackens_whole_patches_of_the_tower(pair: Pair) -> None:
    """28 pixels, 16 visual tokens: round(√16) = 4 cells a side of 7 pixels. Of 16, 11 are black and 5 untouched."""
    image = pair.images[0]
    pixels, before = np.array(masked_image(image, 0.7, 3, side=4)), np.array(image)
    cells = [(slice(7 * r, 7 * r + 7), slice(7 * c, 7 * c + 7)) for r in range(4) for c in range(4)]
    black = [bool((pixels[cell] == 0).all()) for cell in cells]
    assert sum(black) == 11
    assert black == (~dropout_mask(16, 0.7, 3)).tolist()
    assert all((pixels[cell] == before[cell]).all() for cell, gone in zip(cells, black, strict=True) if not gone)


def test_patch_mask_takes_its_grid_from_the_number_of_visual_tokens(pair: Pair) -> None:
    (cut, _) = pair.hide("patch_mask", 0.7)
    by_hand = masked_image(pair.images[0], 0.7, derived_seed("1/a", 0), side=4)
    assert torch.equal(features(cut), features(encode_prompts(pair.vlm, [by_hand], QUESTIONS[:1])[0]))


def test_pixel_mask_blackens_the_rounded_share_of_single_pixels(pair: Pair) -> None:
    """28 · 28 = 784 pixels, ρ = .7: round(548.8) = 549 black in all three channels, the others untouched."""
    pixels, before = np.array(masked_image(pair.images[0], 0.7, 3, side=None)), np.array(pair.images[0])
    black = (pixels == 0).all(axis=-1)
    assert int(black.sum()) == 549
    assert (pixels[~black] == before[~black]).all()


@pytest.mark.parametrize(("size", "side"), [((10, 25), 4), ((3, 2), 4), ((1, 1), None), ((5, 7), 1)])
def test_pictures_of_any_shape_keep_it_and_never_vanish_where_there_are_as_many_pixels_as_cells(
    size: tuple[int, int], side: int | None
) -> None:
    image = picture(0, size).point(lambda v: max(v, 1))
    masked = masked_image(image, 0.99, 0, side=side)
    assert masked.size == image.size
    assert masked.mode == "RGB"
    if side is None or side == 1 or size == (10, 25):
        assert np.array(masked).any()


def test_grey_pictures_are_masked_too() -> None:
    grey = picture(0).convert("L").point(lambda v: max(v, 1))
    assert int((np.array(masked_image(grey, 0.5, 0, side=None)) == 0).all(axis=-1).sum()) == 392


def test_masked_pictures_stay_out_of_the_feature_cache(pair: Pair) -> None:
    before = pair.vlm.features.n_bytes
    pair.hide("pixel_mask", 0.7)
    pair.hide("patch_mask", 0.7)
    assert pair.vlm.features.n_bytes == before > 0


def test_an_unknown_perturbation_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="perturbation: must be one of token_dropout, latent_mask"):
        pair.hide("blur", 0.7)


@pytest.mark.parametrize("kind", ["patch_mask", "pixel_mask"])
def test_each_of_several_images_has_its_own_mask(tmp_path: Path, kind: str) -> None:
    """The same picture twice: masked by hand, the first with the record's seed and the second with one derived from it."""
    vlm = load_model(save_tiny("internvl", tmp_path / "model"), device="cpu")
    image = picture(0).point(lambda v: max(v, 1))
    prompts = encode_prompts(vlm, [[image, image]], QUESTIONS[:1])
    (cut,) = perturbed(vlm, prompts, [[image, image]], QUESTIONS[:1], ["1/a"], kind=kind, ratio=0.7, mask=0)
    seed = derived_seed("1/a", 0)
    n = int((prompts[0].input_ids == prompts[0].image_token_id).sum())
    side = round((n / 2) ** 0.5) if kind == "patch_mask" else None
    by_hand = [masked_image(image, 0.7, s, side=side) for s in (seed, derived_seed(seed, 1))]
    assert not np.array_equal(*map(np.array, by_hand))
    expected = encode_prompts(dataclasses.replace(vlm, features=FeatureCache(max_bytes=0)), [by_hand], QUESTIONS[:1])
    assert torch.equal(features(cut), features(expected[0]))
    assert torch.equal(cut.input_ids, prompts[0].input_ids)
