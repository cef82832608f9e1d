"""Attention of one new token a row where rows stand behind the same prefix: questions on one image read its keys and values once.

Every row has its copy in the padded cache, so rows come and go as ever (hscr/prefix.py); of a prefix that several share one row's copy is
read, with the new tokens of all of them as queries of one product. Each row's own columns follow in a product of their own, and one softmax
goes over both: the numbers are plain attention's but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hscr.prefix import Rows

WORTH = 1024  # prefix columns, over all rows, that are not read again: fewer do not pay for the further kernels


@dataclass(frozen=True)
class _Group:
    """m rows of one prefix, which row `source` has in its columns `start` to `end`."""

    m: int
    source: int
    start: int
    end: int


@dataclass(frozen=True)
class Sharing:
    """`order`: the rows group by group, None where they stand so; `place` undoes it. `tail`: the first column behind any row's prefix;
    `mask` [n, 1, 1, K - tail]: to be added to the scores of the columns from there on; `width`: of the longest prefix."""

    groups: list[_Group]
    order: Tensor | None
    place: Tensor | None
    tail: int
    mask: Tensor
    width: int

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """queries [n, G, h, d] of G groups of h heads, keys and values [n, G, K, d] → [n, G, h, d]."""
        queries = queries * scale
        # Views, row by head: `bmm` of them is half again as fast as `matmul` of four dimensions.
        behind, values_behind = (t[:, :, self.tail :].flatten(0, 1) for t in (keys, values))
        own = torch.bmm(queries.flatten(0, 1), behind.transpose(1, 2))
        own = own.unflatten(0, queries.shape[:2]).add_(self.mask)
        parts = self._together(queries).split(self._sizes(queries), 1)
        found = [
            _widened(torch.bmm(part, keys[g.source, :, g.start : g.end].transpose(-1, -2)), self.width)
            for g, part in zip(self.groups, parts, strict=True)
        ]
        weights = torch.cat([_joined(found), self._together(own)], -1).softmax(-1)
        prefix, rest = weights.split([self.width, own.shape[-1]], -1)
        parts = prefix.split(self._sizes(queries), 1)
        found = [
            torch.bmm(part[..., : g.end - g.start], values[g.source, :, g.start : g.end])
            for g, part in zip(self.groups, parts, strict=True)
        ]
        out = torch.bmm(self._apart(rest, own).flatten(0, 1), values_behind).view_as(queries)
        return out.add_(self._apart(_joined(found), queries))

    def _sizes(self, states: Tensor) -> list[int]:
        return [g.m * states.shape[2] for g in self.groups]

    def _together(self, states: Tensor) -> Tensor:
        """[G, n · h, x] of [n, G, h, x], the rows group by group."""
        states = states if self.order is None else states[self.order]
        return states.transpose(0, 1).flatten(1, 2)

    def _apart(self, states: Tensor, like: Tensor) -> Tensor:
        """[n, G, h, x] of [G, n · h, x], the rows in their own order."""
        n, heads, h, _ = like.shape
        states = states.view(heads, n, h, -1).transpose(0, 1)
        return states if self.place is None else states[self.place]


def _widened(scores: Tensor, width: int) -> Tensor:
    """Scores [..., P] as [..., width], of which nothing behind P is looked at."""
    more = width - scores.shape[-1]
    return F.pad(scores, (0, more), value=-torch.inf) if more else scores


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def sharing(rows: Rows, dtype: torch.dtype) -> Sharing | None:
    """How these rows share prefixes; none where too little is saved, and on a GPU or in half precision, where it was not measured."""
    if rows.new != 1 or rows.ids.device.type != "cpu" or dtype != torch.float32:
        return None
    by_prefix: dict[object, list[int]] = {}
    for row, (key, _) in enumerate(rows.prefixes):
        by_prefix.setdefault(row if key is None else key, []).append(row)
    lengths = [length for _, length in rows.prefixes]
    saved = sum((len(own) - 1) * lengths[own[0]] for own in by_prefix.values())
    if saved < WORTH or 2 * len(by_prefix) > len(lengths):
        return None
    ends = [first + length for first, length in zip(rows.first, lengths, strict=True)]
    tail = min(ends)
    before = torch.arange(tail, rows.ids.shape[1]) < torch.tensor(ends)[:, None]
    hidden = before | (rows.mask[:, tail:] == 0)  # padding may stand between a prefix and what follows it, too
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
    groups = [_Group(len(own), own[0], rows.first[own[0]], ends[own[0]]) for own in by_prefix.values()]
    flat = [row for own in by_prefix.values() for row in own]
    order = None if flat == sorted(flat) else torch.tensor(flat)
    return Sharing(groups, order, None if order is None else order.argsort(), tail, mask[:, None, None], max(lengths))
