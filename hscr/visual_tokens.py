"""Prompts with their visual tokens, and dropping some of these by removal. Paper §3.1 (visual token dropout).

Departures from the paper:
1. Dropped means removed: kept tokens keep their position ids, which equals a mask with holes (tested) and is shorter.
2. The mask is drawn from a seed derived from a name (the record's id, online the image's digest), so a run can be repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question on one image or several.

    input_ids [T], position_ids [T] ([3, T] under M-RoPE), features [N, D] of the visual tokens still in the sequence, in their order.
    `image` is the digest of the image, of all where there are several.
    """

    input_ids: Tensor
    position_ids: Tensor
    features: Tensor | None
    image: str
    image_token_id: int

    def with_features(self, features: Tensor) -> Prompt:
        return dataclasses.replace(self, features=features)

    @property
    def next_position(self) -> int:
        """Position id of the first answer token, on every axis: the same with and without dropped tokens, for a prompt ends with text."""
        return int(self.position_ids[..., -1].max()) + 1


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (Python's hash is salted per process)."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def dropout_mask(n_visual: int, ratio: float, seed: int) -> Tensor:
    """Which of N visual tokens are kept: bool [N] with round(ratio·N) false, at least one true."""
    n_drop = min(round(ratio * n_visual), n_visual - 1)
    keep = torch.ones(n_visual, dtype=torch.bool)
    keep[torch.randperm(n_visual, generator=torch.Generator().manual_seed(seed))[:n_drop]] = False
    return keep


def drop_visual_tokens(prompt: Prompt, keep: Tensor) -> Prompt:
    """The prompt without the visual tokens where `keep` [N] is false; kept tokens keep their position ids."""
    assert prompt.features is not None
    visual = prompt.input_ids == prompt.image_token_id
    rows = torch.ones_like(visual)
    rows[visual] = keep
    return dataclasses.replace(
        prompt,
        input_ids=prompt.input_ids[rows],
        position_ids=prompt.position_ids[..., rows],
        features=prompt.features[keep.to(prompt.features.device)],
    )


def dropped(prompt: Prompt, ratio: float, *seed_parts: object) -> Prompt:
    """i': the prompt with a share of its visual tokens removed, the mask seeded by `seed_parts`."""
    n_visual = int((prompt.input_ids == prompt.image_token_id).sum())
    return drop_visual_tokens(prompt, dropout_mask(n_visual, ratio, derived_seed(*seed_parts)))
