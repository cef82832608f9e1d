"""A short explicit decoding loop over a padded batch: greedy or sampled, one random stream a row.

Rows are [prompt | prefix]; prompts may have different lengths and numbers of visual tokens. Rows that continue one and the same prompt
share its prefill, finished rows leave the batch. Stock `generate` compacts the positions of a prompt with removed tokens and prefills a
prompt once a row, hence this loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from hscr.inputs import attention, image_inputs
from hscr.model import VLM
from hscr.packing import tree_mask
from hscr.token_budget import budget_batches
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
    token_budget: int | None = None,
) -> list[list[int]]:
    """Continue each [prompt | prefix] to end-of-sequence or `max_tokens`; B lists of new ids, end-of-sequence left in.

    Temperature 0 is greedy. A row's tokens do not depend on which rows share its batch (float32). `token_budget` bounds the tokens in the
    key-value cache, padding and answers included: rows are then taken in several batches of like length.
    """
    n = len(prompts)
    prefixes = prefixes or [()] * n
    limits = [max_tokens] * n if isinstance(max_tokens, int) else list(max_tokens)
    heats = [temperature] * n if isinstance(temperature, (int, float)) else list(temperature)
    streams = [torch.Generator().manual_seed(s) for s in seeds or [0] * n]
    out: list[list[int]] = [[] for _ in range(n)]
    # By prompt, then by prefix: rows of one prompt stay neighbours.
    order = {id(p): (len(p.input_ids), number) for number, p in enumerate(prompts)}
    lengths = [len(p.input_ids) + len(x) + limit for p, x, limit in zip(prompts, prefixes, limits, strict=True)]
    asked = [i for i in range(n) if limits[i] > 0]
    for part in budget_batches(
        [lengths[i] for i in asked],
        token_budget,
        key=lambda k: (*order[id(prompts[asked[k]])], len(prefixes[asked[k]])),
    ):
        rows = [asked[k] for k in part]  # the rows of the batch; some of them may have ended
        batch = _Batch(vlm, [prompts[i] for i in rows], [prefixes[i] for i in rows])
        running = set(rows)
        while running:
            logits = batch.logits()
            logits[:, vlm.placeholder_ids] = -torch.inf  # an image placeholder without an image is no answer
            best = logits.argmax(-1).tolist()  # one transfer for all greedy rows
            for at, i in enumerate(rows):
                if i in running:
                    token = _sampled(logits[at], heats[i], streams[i]) if heats[i] > 0 else best[at]
                    best[at] = token
                    out[i].append(token)
                    if token in vlm.eos_ids or len(out[i]) == limits[i]:
                        running.discard(i)
            batch.append(best)
            if len(running) <= len(rows) // 2:  # not whenever a row ends: keeping rows copies the cache
                batch.keep([at for at, i in enumerate(rows) if i in running])
                rows = [i for i in rows if i in running]
    return out


class _Batch:
    """Rows in the making: columns [n, W] of ids, positions ([3, n, W] under M-RoPE) and mask, and the cache of all but the last columns.

    Left padding: every row's last token stands in the last column, so one step appends to all. Where rows share prompts, columns are
    [prompts' own padding | prompt but its last token | padding | last token and prefix].
    """

    def __init__(self, vlm: VLM, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> None:
        self.vlm = vlm
        config = vlm.base.config.get_text_config()
        # A family with masks of its own measures its window in positions: its cache must keep every token, whatever the configuration says.
        self.own_masks = vlm.family.masks is not None
        self.cache = DynamicCache() if self.own_masks else DynamicCache(config=config)
        distinct = list({id(p): p for p in prompts}.values())
        tails = [(torch.tensor(x, dtype=torch.long), _after(p, len(x))) for p, x in zip(prompts, prefixes, strict=True)]
        width = max(len(p.input_ids) for p in prompts) + max(map(len, prefixes), default=0)
        # Padding amid a row would count against a sliding window, which the cache measures in columns.
        window = None if self.own_masks else getattr(config, "sliding_window", None)
        self.ids = torch.empty((len(prompts), 0), dtype=torch.long, device=vlm.device)
        self.mask = self.ids
        self.positions = self.ids.expand(*prompts[0].position_ids.shape[:-1], *self.ids.shape)
        if len(distinct) == len(prompts) or (window is not None and width > window):
            whole = zip(prompts, tails, strict=True)
            self._columns([(torch.cat([p.input_ids, x]), torch.cat([p.position_ids, at], -1)) for p, (x, at) in whole])
            self.extra = image_inputs(vlm, prompts)
            return
        self.ids, self.mask, self.positions = (
            t[..., : len(distinct), :] for t in (self.ids, self.mask, self.positions)
        )
        # The last token of a prompt (always text) goes with the rows, so that every row has one, also without a prefix.
        self._columns([(p.input_ids[:-1], p.position_ids[..., :-1]) for p in distinct])
        self.extra = image_inputs(vlm, distinct)
        self.logits()
        number = {id(p): at for at, p in enumerate(distinct)}
        self.keep([number[id(p)] for p in prompts])
        self._columns(
            [
                (torch.cat([p.input_ids[-1:], x]), torch.cat([p.position_ids[..., -1:], at], -1))
                for p, (x, at) in zip(prompts, tails, strict=True)
            ]
        )

    def _columns(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append a block of columns, (ids [T], positions [..., T]) a row, left-padded."""
        n, width = len(rows), max(len(ids) for ids, _ in rows)
        ids = torch.full((n, width), self.vlm.eos_id)
        positions = torch.zeros((*rows[0][1].shape[:-1], n, width), dtype=torch.long)
        mask = torch.zeros((n, width), dtype=torch.long)
        for row, (own, at) in enumerate(rows):
            start = width - len(own)
            ids[row, start:], positions[..., row, start:], mask[row, start:] = own, at, 1
        self.ids = torch.cat([self.ids, ids.to(self.vlm.device)], -1)
        self.positions = torch.cat([self.positions, positions.to(self.vlm.device)], -1)
        self.mask = torch.cat([self.mask, mask.to(self.vlm.device)], -1)
        self.new = width  # columns that are not in the cache yet

    def logits(self) -> Tensor:
        """Logits [n, V] of what follows the last column."""
        new = self.new
        mask: Tensor | dict[str, Tensor] = self.mask
        if self.own_masks:
            mask = attention(self.vlm, _seen(self.mask, new), self.ids, self.positions)
        logits = self.vlm.model(
            input_ids=self.ids[:, -new:],
            position_ids=self.positions[..., -new:],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **self.extra,
        ).logits[:, -1]
        self.extra = {}  # the features are in the cache now
        return logits

    def append(self, chosen: Sequence[int]) -> None:
        """One token a row."""
        column = torch.tensor(chosen, device=self.vlm.device)[:, None]
        self.ids = torch.cat([self.ids, column], dim=1)
        self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        self.new = 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""
        if list(rows) == list(range(len(self.ids))):
            return
        index = torch.tensor(rows, dtype=torch.long, device=self.vlm.device)
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.positions = self.positions.index_select(-2, index)
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(index)


def _after(prompt: Prompt, n: int) -> Tensor:
    """Positions [n] ([3, n] under M-RoPE) of the n tokens after a prompt."""
    return (prompt.next_position + torch.arange(n)).expand(*prompt.position_ids.shape[:-1], n)


def _seen(mask: Tensor, new: int) -> Tensor:
    """Causal visibility bool [B, 1, new, K] of the last `new` columns, from what is no padding [B, K]."""
    return tree_mask(mask - 1)[:, :, -new:] if new > 1 else mask.bool()[:, None, None]


def _sampled(logits: Tensor, temperature: float, stream: torch.Generator) -> int:
    scaled = (logits - logits.max()).float().cpu() / temperature  # at most 0: no temperature, however small, overflows
    return int(torch.multinomial(torch.softmax(scaled, dim=-1), 1, generator=stream))
