"""A short explicit decoding loop over a padded batch: greedy or sampled, one random stream a row.

Rows are [prompt | prefix]; prompts may have different lengths and numbers of visual tokens. Rows that continue one and the same prompt
are a tree over one cache (hscr/trees.py), finished rows leave the batch. Stock `generate` compacts the positions of a prompt with removed
tokens and prefills a prompt once a row, hence this loop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hscr.model import VLM
from hscr.prefix import Rows
from hscr.token_budget import budget_batches
from hscr.trees import Prefixes, Trees, holds_trees
from hscr.visual_tokens import Prompt


@torch.inference_mode()
def decode(
    vlm: VLM,
    prompts: Sequence[Prompt],
    prefixes: Sequence[Sequence[int]] | None = None,
    *,
    max_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    seeds: Sequence[int] | None = None,
    token_budget: int | None = None,
    known: Prefixes | None = None,
    ended: Callable[[int, Sequence[int]], bool] = lambda row, ids: False,
) -> list[list[int]]:
    """Continue each [prompt | prefix] to end-of-sequence or `max_tokens`; B lists of new ids, end-of-sequence left in.

    Temperature 0 is greedy. A row's tokens do not depend on which rows share its batch (float32). `token_budget` bounds the tokens in the
    key-value cache, padding and answers included: rows are then taken in several batches of like length. `known` holds the caches of
    prompts that were computed before. A row also ends once `ended` says so of its number and new ids.
    """
    n = len(prompts)
    prefixes = prefixes or [()] * n
    limits = [max_tokens] * n if isinstance(max_tokens, int) else list(max_tokens)
    heats = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    streams = [torch.Generator().manual_seed(s) for s in seeds or [0] * n]
    out: list[list[int]] = [[] for _ in range(n)]
    asked = [i for i in range(n) if limits[i] > 0]
    # Trees where continuations share a prompt, or something is known of it; else a row of its own is one forward pass less.
    trees = (known is not None or len({id(prompts[i]) for i in asked}) < len(asked)) and holds_trees(vlm)
    groups: defaultdict[int, list[int]] = defaultdict(list)  # rows that stay together
    for i in asked:
        groups[id(prompts[i]) if trees else i].append(i)
    together = list(groups.values())
    lengths = [len(prompts[g[0]].input_ids) + sum(len(prefixes[i]) + limits[i] for i in g) for g in together]
    for part in budget_batches(lengths, token_budget):
        rows = [i for at in part for i in together[at]]  # the rows of the batch; some of them may have ended
        begun = [prompts[i] for i in rows], [prefixes[i] for i in rows]
        batch = Trees(vlm, *begun, known, room=max(limits[i] for i in rows)) if trees else Rows(vlm, *begun)
        running = set(rows)
        while running:
            logits = batch.logits().reshape(len(rows), -1)
            logits[:, vlm.placeholder_ids] = -torch.inf  # an image placeholder without an image is no answer
            best = logits.argmax(-1).tolist()  # one transfer for all greedy rows
            for at, i in enumerate(rows):
                if i in running:
                    token = sampled(logits[at], heats[i], streams[i]) if heats[i] > 0 else best[at]
                    best[at] = token
                    out[i].append(token)
                    if token in vlm.eos_ids or len(out[i]) == limits[i] or ended(i, out[i]):
                        running.discard(i)
            if len(running) <= len(rows) // 2:  # not whenever a row ends: keeping rows copies the cache
                kept = [at for at, i in enumerate(rows) if i in running]
                rows, best = [rows[at] for at in kept], [best[at] for at in kept]
                if rows:
                    batch.keep(kept)
            if rows:
                batch.append(best)
    return out


def sampled(logits: Tensor, temperature: float, stream: torch.Generator, top_p: float = 1.0) -> int:
    """A token drawn from logits [V]; below 1, `top_p` leaves the likeliest tokens that together reach it (Holtzman et al. 2020)."""
    scaled = (logits - logits.max()).float().cpu() / temperature  # at most 0: no temperature, however small, overflows
    chances = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        ordered, tokens = chances.sort(descending=True, stable=True)
        chances[tokens[ordered.cumsum(0) - ordered >= top_p]] = 0  # the likeliest always stays: nothing is before it
        if not chances.any():
            chances[tokens[0]] = 1
    return int(torch.multinomial(chances, 1, generator=stream))
