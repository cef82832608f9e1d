"""Prompts of a batch as what a model's forward takes: precomputed features, positions, masks. Family differences end here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hscr.model import VLM
from hscr.visual_tokens import Prompt


def image_inputs(vlm: VLM, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The keyword arguments that hand precomputed features of a batch's prompts, in row order, to `model(...)`."""
    features = [p.features for p in prompts if p.features is not None and len(p.features)]
    if not features:
        return {}
    return {"mm_encoder_outputs": {"image": vlm.family.hand_over(features, vlm.base.config)}}


def attention(vlm: VLM, seen: Tensor, ids: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """The model's form of a mask: seen bool [B, 1, Q, K] says what the last Q of a row's K tokens may look at.

    ids [B, K], positions [B, K] ([3, B, K] under M-RoPE): a family's own masks depend on them. Eager attention adds its mask, SDPA
    reads booleans.
    """
    masks = {"": seen}
    if vlm.family.masks is not None:
        masks = vlm.family.masks(seen, ids == vlm.image_token_id, positions, vlm.base.config)
    if vlm.base.config.get_text_config()._attn_implementation == "eager":
        lowest = torch.finfo(vlm.base.dtype).min
        masks = {
            name: torch.zeros(m.shape, dtype=vlm.base.dtype, device=m.device).masked_fill(~m, lowest)
            for name, m in masks.items()
        }
    return masks[""] if vlm.family.masks is None else masks


def tree_mask(segments: Tensor) -> Tensor:
    """Who may see whom: bool [B, 1, T, T] from segments [B, T] (0 prompt, 1… answers, −1 padding).

    A token sees earlier tokens of the prompt and of its own segment; padding sees itself only (a row without any would give NaN).
    """
    t = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(t, t, dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((key == 0) | (key == query)) & (query >= 0) & (key >= 0)
    return (seen | torch.eye(t, dtype=torch.bool, device=segments.device)).unsqueeze(1)
