"""Rows of prompts and what continues them, [prompt | tail], each with a row of its own in the key-value cache.

Serving (hscr/running.py) lets rows join and leave between steps. Several continuations of one prompt share a row in hscr/trees.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hscr.inputs import attention, image_inputs
from hscr.model import VLM
from hscr.visual_tokens import Prompt


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room to spare: a new token is written into them, where the stock layer copies the whole cache.

    Buffers are [rows, heads, columns, d]; what is held is their first n rows and the columns from `_low` to `_high`. Other rows can join
    at the right edge, and rows can leave, without a copy of those that stay.
    """

    ROOM = 64  # columns, where nobody says how many will come
    MOST_ROOM = 256  # for answers, which may end early
    MORE = 4  # rows
    BEFORE = 32  # columns on the left, for newcomers that are a little longer

    def __init__(self) -> None:
        super().__init__()
        self.room = self.ROOM
        self._buffers: list[Tensor] = []
        self._low = self._high = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        if torch.is_grad_enabled():  # what a graph holds must not be written to
            self._buffers = []
            return super().update(key_states, value_states, *args, **kwargs)
        if held == 0:  # held as they came: the next token lays them into buffers
            self._buffers = []
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        new = key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < self._high + new:
            rows = max(len(key_states), len(self._buffers[0]) if self._buffers else 0)
            self._make(rows, held, held + new + self.room)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: len(states), :, self._high : self._high + new] = states
        self._high += new
        return self._look(len(key_states))

    def lay(self, rows: Sequence[tuple[Tensor, Tensor]], more: int) -> None:
        """Hold keys and values [heads, T, d] of one row each, left-padded, in new buffers with room for `more` rows."""
        width = max(keys.shape[1] for keys, _ in rows)
        self._low, self._high = self.BEFORE, self.BEFORE + width
        self._buffers = []
        for which in (0, 1):
            heads, _, d = rows[0][which].shape
            buffer = rows[0][which].new_empty(len(rows) + more, heads, self._high + self.room, d)
            for at, row in enumerate(rows):
                start = self._high - row[which].shape[1]
                buffer[at, :, self._low : start] = 0
                buffer[at, :, start : self._high] = row[which]
            self._buffers.append(buffer)
        if not self.is_initialized:
            self.lazy_initialization(*self._buffers)
        self._look(len(rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = []  # of other rows

    def join(self, other: GrowingLayer) -> None:
        """Take the rows of another layer in below, the last columns of both in one place."""
        self.room = max(self.room, other.room)
        more: list[Any] = [other.keys, other.values]
        mine, new, width = len(self._held()), len(more[0]), more[0].shape[-2]
        if not self._buffers or len(self._buffers[0]) < mine + new or self._high < width:
            high = max(self.get_seq_length(), width)
            self._make(mine + new + self.MORE, high, high + self.room)
        for buffer, states in zip(self._buffers, more, strict=True):
            buffer[mine : mine + new, :, self._low : self._high - width] = 0  # masked, so anything finite
            buffer[mine : mine + new, :, self._high - width : self._high] = states
        if width > self._high - self._low:  # columns that only the newcomers have
            for buffer in self._buffers:
                buffer[:mine, :, self._high - width : self._low] = 0
            self._low = self._high - width
        self._look(mine + new)

    def leave(self, moves: Sequence[tuple[int, int]], n: int, cut: int) -> None:
        """Keep the first n rows after moving rows (to, from), and drop `cut` columns on the left, which only padded."""
        if not self._buffers:
            self._make(len(self._held()), self.get_seq_length(), self.get_seq_length() + self.room)
        for to, source in moves:
            for buffer in self._buffers:
                buffer[to, :, self._low : self._high] = buffer[source, :, self._low : self._high]
        self._low += cut
        self._look(n)

    @property
    def span(self) -> tuple[int, int]:
        """The columns of the buffers that are held, from and to."""
        return (self._low, self._high) if self._buffers else (0, self.get_seq_length())

    @property
    def buffers(self) -> Sequence[Tensor]:
        """Keys and values with their room, or nothing where what is held lies as it came."""
        return self._buffers

    def lie_in(self, buffers: Sequence[Tensor]) -> None:
        """Move what is held to the left edge of other buffers, which may share memory with the ones it lies in; their rest is zero."""
        held: list[Any] = [self.keys, self.values]
        n, width = len(held[0]), held[0].shape[-2]
        held = [
            t.clone() if t.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() else t
            for t, b in zip(held, buffers, strict=True)
        ]
        for buffer, states in zip(buffers, held, strict=True):
            buffer.zero_()
            buffer[:n, :, :width] = states
        self._buffers, self._low, self._high = list(buffers), 0, width
        self._look(n)

    def wrote(self, new: int) -> None:
        """Hold so many more columns, which somebody has written into the buffers behind what is held."""
        self._high += new
        self._look(len(self._held()))

    def _make(self, rows: int, high: int, columns: int) -> None:
        """New buffers, what is held copied to end at column `high`."""
        held: list[Any] = [self.keys, self.values]
        width = held[0].shape[-2]
        # Empty: what is looked at is written first. Zeroing hundreds of megabytes took longer than the copy.
        self._buffers = [t.new_empty(rows, t.shape[1], columns, t.shape[3]) for t in held]
        for buffer, states in zip(self._buffers, held, strict=True):
            buffer[: len(states), :, high - width : high] = states
        self._low, self._high = high - width, high

    def _held(self) -> Tensor:
        held: Any = self.keys
        return held

    def _look(self, n: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:n, :, self._low : self._high] for buffer in self._buffers)
        return self.keys, self.values


def empty_cache(vlm: VLM, new: int = GrowingLayer.ROOM) -> DynamicCache:
    """A cache for the model's language model, whose buffers will have room for `new` tokens; layers with a sliding window stay stock."""
    if vlm.empty_cache is None:  # asking the configuration takes a millisecond
        # A family with masks of its own measures its window in positions: its cache must keep every token, whatever the configuration
        # says.
        own_masks, config = vlm.family.masks is not None, vlm.base.config.get_text_config()
        cache = DynamicCache() if own_masks else DynamicCache(config=config)
        held = cache.layers or [DynamicLayer() for _ in range(config.num_hidden_layers)]
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in held]
        cache.layer_class_to_replicate = GrowingLayer if cache.layer_class_to_replicate is DynamicLayer else None
        vlm.empty_cache = cache
    cache = copy.deepcopy(vlm.empty_cache)
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.room = new
    return cache


def fill(cache: DynamicCache, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], more: int = 0) -> None:
    """Put keys and values [heads, T, d] by layer, of one row each, into an empty cache, left-padded; `more` rows are expected to join."""
    if joinable(cache) and not torch.is_grad_enabled():
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            layer.lay([own[number] for own in rows], more)
        return
    width = max(own[0][0].shape[1] for own in rows)
    for layer in range(len(rows[0])):
        keys, values = (_left_padded([own[layer][which] for own in rows], width) for which in (0, 1))
        cache.update(keys, values, layer)


def _left_padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """[n, heads, width, d] of rows [heads, T, d]."""
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], width, rows[0].shape[2])
    for at, row in enumerate(rows):
        out[at, :, width - row.shape[1] :] = row
    return out


class Rows:
    """Columns [n, W] of ids, positions ([3, n, W] under M-RoPE) and mask of n rows, and the cache of all but the last `new` columns.

    Left padding: every row's last token stands in the last column, so one step appends to all.
    """

    def __init__(
        self,
        vlm: VLM,
        prompts: Sequence[Prompt],
        tails: Sequence[Sequence[int]],
        new: int = GrowingLayer.ROOM,
    ) -> None:
        """`new`: tokens that will be appended to a row, about."""
        self._start(vlm, prompts, min(new, GrowingLayer.MOST_ROOM))
        self._columns([tokens_of(p, 0, tail) for p, tail in zip(prompts, tails, strict=True)])

    @classmethod
    def after(
        cls,
        vlm: VLM,
        prompts: Sequence[Prompt],
        held: Sequence[Sequence[tuple[Tensor, Tensor]]],
        tails: Sequence[Sequence[int]],
        new: int = GrowingLayer.ROOM,
    ) -> Rows:
        """Rows whose prompts' first tokens are computed: `held` has a row's keys and values by layer, [heads, tokens, d]."""
        rows = cls.__new__(cls)
        starts = [own[0][0].shape[1] for own in held]
        new = min(new, GrowingLayer.MOST_ROOM) + max(
            len(p.input_ids) - n + len(tail) for p, n, tail in zip(prompts, starts, tails, strict=True)
        )
        rows._start(vlm, prompts, new)
        rows.images = ()  # they are in what is held
        rows._columns([(p.input_ids[:n], p.position_ids[..., :n]) for p, n in zip(prompts, starts, strict=True)])
        fill(rows.cache, held, more=GrowingLayer.MORE)
        rows._columns([tokens_of(p, n, tail) for p, n, tail in zip(prompts, starts, tails, strict=True)])
        return rows

    def _start(self, vlm: VLM, prompts: Sequence[Prompt], room: int) -> None:
        self.vlm, self.own_masks, self.cache = vlm, vlm.family.masks is not None, empty_cache(vlm, room)
        self.ids = torch.empty((len(prompts), 0), dtype=torch.long, device=self.vlm.device)
        self.first: list[int] = []  # the column where a row begins
        # A row's first tokens by name and number: rows that have a name in common have equal keys and values there; None: nobody else's.
        self.prefixes: list[tuple[str | None, int]] = [(None, 0)] * len(prompts)
        self.mask = self.ids
        self.positions = self.ids.expand(*prompts[0].position_ids.shape[:-1], *self.ids.shape)
        self.images: Sequence[Prompt] = prompts  # whose visual tokens are among the new columns

    def _columns(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append a block of columns, (ids [T], positions [..., T]) a row, left-padded."""
        n, width = len(rows), max(len(ids) for ids, _ in rows)
        self.first = self.first or [width - len(ids) for ids, _ in rows]
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

    def logits(self, last: int = 1) -> Tensor:
        """Logits [n, last, V] of what follows each of the last columns."""
        new = self.new
        mask: Tensor | dict[str, Tensor] = self.mask
        if self.own_masks:
            mask = attention(self.vlm, seen(self.mask, new), self.ids, self.positions)
        logits: Tensor = self.vlm.model(
            input_ids=self.ids[:, -new:],
            position_ids=self.positions[..., -new:],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
            **image_inputs(self.vlm, self.images),
        ).logits
        self.images = ()  # the features are in the cache now
        return logits

    def extend(self, tails: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Append a block of columns, (ids [T], positions [..., T]) a row, left-padded; logits [n, longest T, V] of what follows each."""
        self._columns(tails)
        return self.logits(self.new)

    def append(self, chosen: Sequence[int]) -> None:
        """One token a row."""
        column = torch.tensor(chosen, device=self.vlm.device)[:, None]
        self.ids = torch.cat([self.ids, column], dim=1)
        self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        self.new = 1

    def beginning(self, row: int, n: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the keys and values [heads, n, d], by layer, of a row's first n tokens, which are computed."""
        at = slice(self.first[row], self.first[row] + n)
        layers: list[Any] = self.cache.layers
        return [(layer.keys[row, :, at].clone(), layer.values[row, :, at].clone()) for layer in layers]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""
        if list(rows) == list(range(len(self.ids))):
            return
        self.first, self.prefixes = [self.first[row] for row in rows], [self.prefixes[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.vlm.device)
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.positions = self.positions.index_select(-2, index)
        self.cache.batch_select_indices(index)

    @property
    def can_join(self) -> bool:
        """Whether rows may come and go between steps: not where a stock layer has dropped what lies before its window."""
        return joinable(self.cache)

    def join(self, other: Rows) -> None:
        """Take in rows that have one new column, as these do."""
        assert self.new == other.new == 1
        width = max(self.ids.shape[1], other.ids.shape[1])
        for rows in (self, other):
            more = width - rows.ids.shape[1]
            rows.ids, rows.positions, rows.mask = (F.pad(t, (more, 0)) for t in (rows.ids, rows.positions, rows.mask))
            rows.first = [at + more for at in rows.first]
        self.ids, self.mask = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        self.positions = torch.cat([self.positions, other.positions], dim=-2)
        self.first += other.first
        self.prefixes += other.prefixes
        layers: list[Any] = self.cache.layers
        for mine, its in zip(layers, other.cache.layers, strict=True):
            mine.join(its)

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Go on without these rows: the old numbers of those that stay, in their new order. The last rows move into the gaps."""
        n = len(self.ids) - len(gone)
        gaps = sorted(row for row in gone if row < n)
        movers = [row for row in range(n, len(self.ids)) if row not in gone]
        order = list(range(n))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        if not self.can_join or n == 0:
            self.keep(order)
            return order
        self.first, self.prefixes = [self.first[row] for row in order], [self.prefixes[row] for row in order]
        cut = min(self.first)
        index = torch.tensor(order, dtype=torch.long, device=self.vlm.device)
        self.ids, self.mask = self.ids[index, cut:], self.mask[index, cut:]
        self.positions = self.positions.index_select(-2, index)[..., cut:]
        self.first = [at - cut for at in self.first]
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.leave(list(zip(gaps, movers, strict=True)), n, cut)
        return order


def joinable(cache: DynamicCache) -> bool:
    """Every layer keeps every token, so that rows of other lengths can stand beside each other whenever they come."""
    kinds: set[Any] = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return kinds == {GrowingLayer}


def tokens_of(prompt: Prompt, start: int, tail: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids [T] and positions [T] ([3, T] under M-RoPE) of [prompt | tail] from `start` on."""
    axes = prompt.position_ids.shape[:-1]
    after = (prompt.next_position + torch.arange(len(tail))).expand(*axes, len(tail))
    ids = torch.cat([prompt.input_ids[start:], torch.tensor(tail, dtype=torch.long)])
    return ids, torch.cat([prompt.position_ids[..., start:], after], dim=-1)


def seen(mask: Tensor, new: int) -> Tensor:
    """Causal visibility bool [B, 1, new, K] of the last `new` columns, from what is no padding [B, K]; padding sees itself."""
    known = mask.bool()[:, None, None]
    if new == 1:
        return known
    k = mask.shape[1]
    earlier = torch.ones(new, k, dtype=torch.bool, device=mask.device).tril(k - new)
    return (known & earlier) | earlier.triu(k - new)
