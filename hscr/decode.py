"""A short explicit decoding loop over a padded batch: greedy or sampled, one random stream a row.

Rows are [prompt | prefix]; prompts may have different lengths and numbers of visual tokens. Stock `generate` compacts the positions
of a prompt with removed tokens, hence this loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from hscr.inputs import attention, image_inputs
from hscr.model import VLM
from hscr.packing import tree_mask
from hscr.visual_tokens import Prompt


@torch.no_grad()
def decode(
    vlm: VLM,
    prompts: Sequence[Prompt],
    prefixes: Sequence[Sequence[int]] | None = None,
    *,
    max_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each [prompt | prefix] to end-of-sequence or `max_tokens`; B lists of new ids, end-of-sequence left in.

    Temperature 0 is greedy. A row's tokens do not depend on which rows share its batch (float32).
    """
    n = len(prompts)
    if n == 0:
        return []
    prefixes = prefixes or [()] * n
    limits = [max_tokens] * n if isinstance(max_tokens, int) else list(max_tokens)
    heats = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    streams = [torch.Generator().manual_seed(s) for s in seeds or [0] * n]
    lengths = [len(p.input_ids) + len(x) for p, x in zip(prompts, prefixes, strict=True)]
    width = max(lengths)
    # Left padding: every row's last token stands in the last column, so one step appends to all.
    ids = torch.full((n, width), vlm.eos_id)
    positions = torch.zeros((*prompts[0].position_ids.shape[:-1], n, width), dtype=torch.long)
    mask = torch.zeros((n, width), dtype=torch.long)
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        start, middle = width - lengths[row], width - len(prefix)
        ids[row, start:middle], positions[..., row, start:middle] = prompt.input_ids, prompt.position_ids
        ids[row, middle:] = torch.tensor(prefix, dtype=torch.long)
        positions[..., row, middle:] = prompt.next_position + torch.arange(len(prefix))
        mask[row, start:] = 1
    # A family with masks of its own measures its window in positions: its cache must keep every token, whatever the configuration says.
    own_masks = vlm.family.masks is not None
    cache = DynamicCache() if own_masks else DynamicCache(config=vlm.base.config.get_text_config())
    out: list[list[int]] = [[] for _ in range(n)]
    ids, positions, mask = ids.to(vlm.device), positions.to(vlm.device), mask.to(vlm.device)
    extra = image_inputs(vlm, prompts)
    running = [limit > 0 for limit in limits]
    new = width  # columns that are not in the cache yet
    while any(running):
        logits = vlm.model(
            input_ids=ids[:, -new:],
            position_ids=positions[..., -new:],
            attention_mask=attention(vlm, _seen(mask, new), ids, positions) if own_masks else mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        ).logits[:, -1]
        logits[:, vlm.placeholder_ids] = -torch.inf  # an image placeholder without an image is no answer
        chosen = [_pick(logits[row], heats[row], streams[row]) if running[row] else vlm.eos_id for row in range(n)]
        for row, token in enumerate(chosen):
            if running[row]:
                out[row].append(token)
                running[row] = token not in vlm.eos_ids and len(out[row]) < limits[row]
        ids = torch.cat([ids, torch.tensor(chosen, device=vlm.device)[:, None]], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        mask = torch.cat([mask, mask.new_ones(n, 1)], dim=1)
        extra, new = {}, 1  # the features are in the cache now
    return out


def _seen(mask: Tensor, new: int) -> Tensor:
    """Causal visibility bool [B, 1, new, K] of the last `new` columns, from what is no padding [B, K]."""
    return tree_mask(mask - 1) if new > 1 else mask.bool()[:, None, None]


def _pick(logits: Tensor, temperature: float, stream: torch.Generator) -> int:
    if not temperature > 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).float().cpu() / temperature  # at most 0: no temperature, however small, overflows
    probabilities = torch.softmax(scaled, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=stream))
