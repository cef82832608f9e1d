"""Attention where several heads share keys and values, under a mask: the heads of a group become queries of one head.

Stock SDPA attention copies keys and values for every head of a group as soon as a mask comes with more than one query (grouped-query
attention, Ainslie et al. 2023, arXiv 2305.13245): the whole cache, at every layer and step. Here the queries are laid side by side, and
the mask is copied, which is smaller while queries are few.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hscr.block_attention import attended

NAME = "grouped_sdpa"


def grouped_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, d], key and value [B, G, K, d], mask [B, 1, Q, K], blocks or none → [B, Q, H, d]."""
    if isinstance(attention_mask, BlockMask):  # packed rows by blocks
        return attended(query, key, value, attention_mask, scaling), None
    b, h, q, d = query.shape
    g, k = key.shape[1:3]
    mask_is_smaller = q < 2 * g * d  # Q·K numbers a head of a group, against 2·G·K·d
    if attention_mask is None or attention_mask.shape[1] > 1 or g == h or not mask_is_smaller:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return stock
    side_by_side = query.reshape(b, g, h // g * q, d)
    mask = attention_mask.expand(b, h // g, q, k).reshape(b, 1, h // g * q, k)
    out = F.scaled_dot_product_attention(side_by_side, key, value, mask, dropout_p=dropout, scale=scaling)
    return out.reshape(b, h, q, -1).transpose(1, 2).contiguous(), None


def group_heads(language_model: Any) -> None:
    """Let a decoder that runs on stock SDPA attention run on this one."""
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
