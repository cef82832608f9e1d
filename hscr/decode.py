"""A short explicit decoding loop over a padded batch: greedy or sampled, one random stream a row.

Rows are [prompt | prefix]; prompts may have different lengths and numbers of visual tokens. Stock `generate` compacts the positions
of a prompt with removed tokens, hence this loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from hscr.model import VLM
from hscr.visual_tokens import Prompt, image_inputs


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
    positions = torch.zeros((n, width), dtype=torch.long)
    mask = torch.zeros((n, width), dtype=torch.long)
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        start, middle = width - lengths[row], width - len(prefix)
        ids[row, start:middle], positions[row, start:middle] = prompt.input_ids, prompt.position_ids
        ids[row, middle:] = torch.tensor(prefix, dtype=torch.long)
        positions[row, middle:] = prompt.next_position + torch.arange(len(prefix))
        mask[row, start:] = 1
    cache = DynamicCache(config=vlm.base.config.get_text_config())
    out: list[list[int]] = [[] for _ in range(n)]
    ids, positions, mask = ids.to(vlm.device), positions.to(vlm.device), mask.to(vlm.device)
    extra = image_inputs(prompts)
    running = [limit > 0 for limit in limits]
    while any(running):
        logits = vlm.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        ).logits[:, -1]
        logits[:, vlm.image_token_id] = -torch.inf  # an image placeholder without an image is no answer
        chosen = [_pick(logits[row], heats[row], streams[row]) if running[row] else vlm.eos_id for row in range(n)]
        for row, token in enumerate(chosen):
            if running[row]:
                out[row].append(token)
                running[row] = token not in vlm.eos_ids and len(out[row]) < limits[row]
        ids = torch.tensor(chosen, device=vlm.device)[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(n, 1)], dim=1)
        extra = {}  # the features are in the cache now
    return out


def _pick(logits: Tensor, temperature: float, stream: torch.Generator) -> int:
    if not temperature > 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).float().cpu() / temperature  # at most 0: no temperature, however small, overflows
    probabilities = torch.softmax(scaled, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=stream))
