"""Attention of packed rows by blocks of 128 × 128 tokens: those that nobody may see are not computed (flex_attention, Dong et al. 2024,
arXiv 2412.05496). The blocks follow from the segments of a row; no mask of token × token is made.

A kernel is compiled for CUDA at its first use; without compiling, which is what tests on a CPU do, flex_attention computes all pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from hscr.model import VLM

BLOCK = 128


def why_not(vlm: VLM) -> str | None:
    """Why packed rows of this model cannot be attended by blocks, in words; None where they can."""
    if vlm.device.type != "cuda":
        return f"flex_attention has a backward pass on CUDA only, and this is {vlm.device.type}"
    return why_not_family(vlm)


def why_not_family(vlm: VLM) -> str | None:
    """The same as far as it does not depend on the device."""
    if vlm.family.masks is not None:
        return f"{vlm.family.name} has attention masks of its own"
    kind = vlm.base.config.get_text_config()._attn_implementation
    return None if kind == "grouped_sdpa" else f"the model's attention is {kind}, which takes no blocks"


def segment_blocks(segments: Tensor) -> BlockMask:
    """Who may see whom, as hscr.inputs.tree_mask says it, of segments [B, T] (0 prompt, 1… answers in order, −1 padding behind them).

    T is a multiple of 128. A block of keys is full where each of its tokens is seen by each of the block of queries, partial where it may
    be that some are, and left out else: answers but their own, what comes later, padding.
    """
    b, t = segments.shape
    assert t % BLOCK == 0, t
    tiles = segments.view(b, t // BLOCK, BLOCK)
    last, padded = tiles.amax(-1), (tiles < 0).any(-1)
    first = tiles.masked_fill(tiles < 0, t).amin(-1)  # larger than any segment where all is padding
    number = torch.arange(t // BLOCK, device=segments.device)
    earlier, same = number[:, None] > number, number[:, None] == number  # [queries, keys]
    first_q, last_q, padded_q = (x[:, :, None] for x in (first, last, padded))
    first_k, last_k, padded_k = (x[:, None] for x in (first, last, padded))
    shared = (first_k <= last_q) & (first_q <= last_k)  # some segment is in both
    seen = (earlier & ((first_k == 0) | shared) & (last_q >= 0)) | same
    one = (last_k == 0) | (shared & (first_k == last_k) & (first_q == last_q))
    full = earlier & one & ~padded_k & ~padded_q

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, its = segments[b, q], segments[b, k]
        return (q == k) | ((q >= k) & (own >= 0) & ((its == 0) | (its == own)))

    return BlockMask.from_kv_blocks(*_listed(seen & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For bool [B, Q, K] how many a row has [B, 1, Q], and which come first [B, 1, Q, K]."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()


def attended(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float | None) -> Tensor:
    """query [B, H, T, d], key and value [B, G, T, d] → [B, T, H, d]."""
    plain: Any = flex_attention
    attend = _compiled() if query.device.type == "cuda" else plain
    shared = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()


@functools.cache
def _compiled() -> Callable[..., Any]:
    # One kernel for all shapes: by default each new shape is compiled, and past eight flex_attention silently computes all pairs.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
