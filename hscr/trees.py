"""Several continuations of each prompt as one tree of columns: a prompt stands in the key-value cache once, whatever continues it.

A row a prompt: [prompt but its last token | columns of its continuations]. A column sees the prompt, the tokens that lead to it, and
itself; equal beginnings of a prompt's continuations are one column. Decoding (hscr/decode.py) and scoring (hscr/packing.py) stand on it.
Differentiable: the cache holds the graph of its keys and values.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from hscr.inputs import attention
from hscr.model import VLM
from hscr.plain_decoder import decoder_without_gradients
from hscr.prefix import Rows, empty_cache, fill, joinable, tokens_of
from hscr.visual_tokens import Prompt

MOST_ROOM = 512  # columns that a cache's buffers are made larger by at a time: long answers may end early


@dataclass(frozen=True)
class Known:
    """A row [prompt | tail] that was computed: its keys and values [heads, T, d] by layer."""

    prompt: Prompt
    tail: Sequence[int]
    layers: list[tuple[Tensor, Tensor]]


class Prefixes:
    """Rows that were computed before, one a prompt; they live as long as this does.

    Prompts are told apart as objects: two of equal tokens may hide other parts of an image.
    """

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def put(self, prompts: Sequence[Prompt], tails: Sequence[Sequence[int]], cache: DynamicCache) -> None:
        """Remember rows [prompt | tail] of a left-padded cache, which must hold every token of them."""
        layers: list[Any] = cache.layers
        for row, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
            t = len(prompt.input_ids) + len(tail)
            held = [(layer.keys[row, :, -t:], layer.values[row, :, -t:]) for layer in layers]
            self._known[id(prompt)] = Known(prompt, tail, held)  # it holds the prompt: its id must not be another's

    def get(self, prompts: Sequence[Prompt]) -> list[Known]:
        """Empty unless all are known."""
        found = [self._known[id(p)] for p in prompts if id(p) in self._known]
        return found if len(found) == len(prompts) else []


def holds_trees(vlm: VLM) -> bool:
    """Whether a tree says what rows of their own would: not where a layer's stock cache drops what lies before its window."""
    return joinable(empty_cache(vlm))


@dataclass(frozen=True)
class Column:
    """A token of a branch: it sees the first `chain` tokens of its row's known chain, the column `parent` with all that it sees, itself.
    `depth` counts from the prompt's last token."""

    token: int
    depth: int
    chain: int
    parent: int | None


def branches(chain: Sequence[int], tails: Sequence[Sequence[int]]) -> tuple[list[Column], list[list[int]]]:
    """The columns that tails need beside a known chain, and the columns of each tail; its last token always has one.

    Chain and tails begin with the prompt's last token.
    """
    columns: list[Column] = []
    number: dict[tuple[int, int | None, int], int] = {}
    paths = []
    for tail in tails:
        known = 0
        while known < min(len(chain), len(tail) - 1) and chain[known] == tail[known]:
            known += 1
        path: list[int] = []
        for depth in range(known, len(tail)):
            column = Column(tail[depth], depth, known, path[-1] if path else None)
            key = (column.chain, column.parent, column.token)
            if key not in number:
                number[key] = len(columns)
                columns.append(column)
            path.append(number[key])
        paths.append(path)
    return columns, paths


class Trees:
    """n continuations [prompt | tail] of R prompts: one forward pass over the tails, then one column a continuation and step.

    `room` bounds the steps. `seen` bool [n, C]: the columns that a continuation's next token sees; `ends` [n] ([3, n]): where it ended.
    """

    def __init__(
        self,
        vlm: VLM,
        prompts: Sequence[Prompt],
        tails: Sequence[Sequence[int]],
        prefixes: Prefixes | None = None,
        *,
        room: int = 0,
    ) -> None:
        """Prompts are computed unless `prefixes` knows them all."""
        self.vlm = vlm
        self.prompts = list({id(p): p for p in prompts}.values())
        number = {id(p): row for row, p in enumerate(self.prompts)}
        self._place([number[id(p)] for p in prompts])
        last = [int(p.input_ids[-1]) for p in self.prompts]
        sequences = [[last[row], *tail] for row, tail in zip(self.row.tolist(), tails, strict=True)]
        known = prefixes.get(self.prompts) if prefixes is not None else []
        if known:
            self.cache = empty_cache(vlm)
            fill(self.cache, [k.layers for k in known])
            held = [tokens_of(k.prompt, 0, k.tail) for k in known]
            chains = [[start, *k.tail] for start, k in zip(last, known, strict=True)]
        else:
            self.cache = but_last(vlm, self.prompts).cache
            held = [(p.input_ids[:-1], p.position_ids[..., :-1]) for p in self.prompts]
            chains = [[] for _ in self.prompts]
        self._decoder = decoder_without_gradients(vlm)
        self._lay_out(held, chains, sequences, room)

    def _place(self, rows: Sequence[int]) -> None:
        """Give every continuation a slot in its row."""
        taken: defaultdict[int, int] = defaultdict(int)
        slots = []
        for row in rows:
            slots.append(taken[row])
            taken[row] += 1
        self.slots = max(taken.values())
        self.row, self.slot = torch.tensor([rows, slots], device=self.vlm.device)

    def _lay_out(
        self,
        held: Sequence[tuple[Tensor, Tensor]],
        chains: Sequence[Sequence[int]],
        sequences: Sequence[Sequence[int]],
        room: int,
    ) -> None:
        """[held, left-padded | the sequences' columns, right-padded | `room` steps]."""
        n, start, rows = len(self.prompts), max(len(ids) for ids, _ in held), self.row.tolist()
        made = [
            branches(chain, [own for row, own in zip(rows, sequences, strict=True) if row == at])
            for at, chain in enumerate(chains)
        ]
        paths = [iter(own) for _, own in made]
        self.paths = [next(paths[row]) for row in rows]
        self.new = max(len(columns) for columns, _ in made)
        self.width = start + self.new
        total = self.width + room * self.slots
        ids = torch.full((n, total), self.vlm.eos_id)
        positions = torch.zeros((*self.prompts[0].position_ids.shape[:-1], n, total), dtype=torch.long)
        mask = np.zeros((n, self.new, self.width), dtype=bool)
        mask[:, :, start:] = np.eye(self.new, dtype=bool)  # padding sees itself, or its softmax would be none
        for row, (columns, _) in enumerate(made):
            first, end = start - len(held[row][0]), start - len(chains[row])
            ids[row, first:start], positions[..., row, first:start] = held[row]
            own = slice(start, start + len(columns))
            ids[row, own] = torch.tensor([c.token for c in columns])
            positions[..., row, own] = self.prompts[row].next_position - 1 + torch.tensor([c.depth for c in columns])
            for at, column in enumerate(columns):
                mask[row, at, first : end + column.chain] = True
                if column.parent is not None:
                    mask[row, at, start:] |= mask[row, column.parent, start:]
        device = self.vlm.device
        self.ids, self.positions, self.mask = ids.to(device), positions.to(device), torch.from_numpy(mask).to(device)
        tips = torch.tensor([path[-1] for path in self.paths], device=device)
        self.seen = self.mask.new_zeros(len(tips), total)
        self.seen[:, : self.width] = self.mask[self.row, tips]
        self.ends = self.positions[..., self.row, start + tips]
        last_columns = tips.new_zeros(n, self.slots)
        last_columns[self.row, self.slot] = tips
        self._keep: int | Tensor = last_columns  # columns whose logits are asked for; 0: all
        self._steps = False  # whether the new columns are a step's
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.room = min(room * self.slots, MOST_ROOM)

    def logits(self) -> Tensor:
        """Logits [n, V] of what follows each continuation."""
        return self._forward(self._keep)[self.row, self.slot]

    def path_logits(self) -> list[Tensor]:
        """For each continuation, before any step, logits [1 + tail, V] of what follows the prompt and each token of the tail."""
        logits = self._forward(0)
        return [logits[row, path] for row, path in zip(self.row.tolist(), self.paths, strict=True)]

    def _forward(self, keep: int | Tensor) -> Tensor:
        ids, positions = self.ids[:, : self.width], self.positions[..., : self.width]
        new_ids, new_positions = ids[:, -self.new :], positions[..., -self.new :]
        if self._decoder is not None:
            kept = keep if isinstance(keep, Tensor) else None
            return self._decoder.column_logits(
                new_ids, new_positions, self.mask[:, None], self.cache, kept, step=self._steps
            )
        logits: Tensor = self.vlm.model(
            input_ids=new_ids,
            position_ids=new_positions,
            attention_mask=attention(self.vlm, self.mask[:, None], ids, positions),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these continuations, after `logits` and before `append`; prompts that none of them continues leave the cache."""
        index = torch.tensor(kept, device=self.vlm.device)
        rows, numbers = self.row[index].unique(return_inverse=True)
        if len(rows) < len(self.ids):
            self.ids, self.positions = self.ids[rows], self.positions.index_select(-2, rows)
            self.cache.batch_select_indices(rows)
        self.seen, self.ends = self.seen[index], self.ends[..., index]
        self._place(numbers.tolist())

    def append(self, chosen: Sequence[int]) -> None:
        """One token a continuation."""
        old, new = self.width, self.slots
        self.mask = self.seen.new_zeros(len(self.ids), new, old + new)
        self.mask[:, :, old:] = torch.eye(new, dtype=torch.bool, device=self.mask.device)
        self.mask[self.row, self.slot, :old] = self.seen[:, :old]
        columns = old + self.slot
        self.seen.scatter_(1, columns[:, None], True)
        self.ends = self.ends + 1
        self.ids[self.row, columns] = torch.tensor(chosen, device=self.vlm.device)
        self.positions[..., self.row, columns] = self.ends
        self.new, self.width, self._keep, self._steps = new, old + new, 0, True


def but_last(vlm: VLM, prompts: Sequence[Prompt]) -> Rows:
    """Prompts computed but their last token (always text): it goes with what continues them, so that every continuation has a column, also
    without a tail."""
    heads = [dataclasses.replace(p, input_ids=p.input_ids[:-1], position_ids=p.position_ids[..., :-1]) for p in prompts]
    rows = Rows(vlm, heads, [()] * len(heads))
    rows.logits()
    return rows
