"""i' from i: the four ways of hiding a share ρ of the image from the model. Paper §3.1 and its ablation of perturbations.

token_dropout removes visual tokens (hscr/visual_tokens.py); latent_mask keeps them in the sequence with their features zeroed; patch_mask
and pixel_mask blank parts of the picture before the tower sees it. Nothing here depends on a family: a picture goes through its processor
like any other.

Choices that the paper leaves open:
1. Blank is black: zero intensity in every channel, the background of most medical images.
2. Patches are the cells of a grid over the picture, round(√N) a side for N visual tokens, stretched where it is not square. They are the
   tower's own patches only where the processor neither crops nor pads.
3. Pixels are the picture's own. A picture larger than the tower's input is resized after the mask, which averages single black pixels
   into a darker picture: a weak perturbation, and weaker the larger the picture.
4. A mask is drawn as in dropout by removal, from the same seed, and never hides everything; ρ = 0 gives i itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from PIL import Image

from hscr.chat import Asked
from hscr.config import PERTURBATIONS
from hscr.feature_cache import FeatureCache
from hscr.images import Images, as_images
from hscr.masking import blackened
from hscr.model import VLM, encode_prompts
from hscr.visual_tokens import Prompt, derived_seed, dropout_mask, dropped


def perturbed(
    vlm: VLM,
    prompts: Sequence[Prompt],
    images: Sequence[Images],
    questions: Sequence[Asked],
    names: Sequence[object],
    *,
    kind: str,
    ratio: float,
    mask: int,
) -> list[Prompt]:
    """i' of each prompt with mask number `mask`, seeded by its name. `images` and `questions` are what `prompts` were encoded from.

    Raises ValueError for an unknown kind.
    """
    if kind not in PERTURBATIONS:
        raise ValueError(f"perturbation: must be one of {', '.join(PERTURBATIONS)}")
    if ratio == 0:  # on a GPU even the same picture encoded again differs in the last bits
        return list(prompts)
    if kind == "token_dropout":
        return [dropped(p, ratio, name, mask) for p, name in zip(prompts, names, strict=True)]
    seeds = [derived_seed(name, mask) for name in names]
    if kind == "latent_mask":
        return [_latents_masked(p, ratio, s) for p, s in zip(prompts, seeds, strict=True)]
    hidden = []
    for prompt, shown, seed in zip(prompts, images, seeds, strict=True):
        pictures = as_images(shown)
        side = round(math.sqrt(_n_visual(prompt) / len(pictures))) if kind == "patch_mask" else None
        own = [seed, *(derived_seed(seed, n) for n in range(1, len(pictures)))]  # each picture has its own mask
        hidden.append([masked_image(p, ratio, s, side=side) for p, s in zip(pictures, own, strict=True)])
    # Past the cache: a masked picture is seen once, and would push out pictures that training and evaluation meet again.
    return encode_prompts(dataclasses.replace(vlm, features=FeatureCache(max_bytes=0)), hidden, questions)


def _n_visual(prompt: Prompt) -> int:
    return int((prompt.input_ids == prompt.image_token_id).sum())


def _latents_masked(prompt: Prompt, ratio: float, seed: int) -> Prompt:
    """The prompt with the features [N, D] of a share of its visual tokens set to zero."""
    assert prompt.features is not None
    keep = dropout_mask(_n_visual(prompt), ratio, seed).to(prompt.features.device)
    return prompt.with_features(prompt.features * keep[:, None])


def masked_image(image: Image.Image, ratio: float, seed: int, *, side: int | None) -> Image.Image:
    """The picture in RGB with a share of its side × side cells (None: of its pixels) black; at least one of them stays."""
    rows, columns = (side, side) if side else (image.height, image.width)
    return blackened(image, dropout_mask(rows * columns, ratio, seed).reshape(rows, columns).numpy())
