"""How many tokens share a forward pass: batches by budget instead of by count, and half the budget where the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from hscr.events import Warning_

T = TypeVar("T")


def budget_batches(
    lengths: Sequence[int], budget: int | None, key: Callable[[int], Any] | None = None
) -> list[list[int]]:
    """Rows sorted by `key` (default: by length) and cut into batches whose rows × longest row stay within `budget` tokens.

    A row longer than the budget is a batch of its own; None sets no bound. Like lengths share a batch, so little of it is padding.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=key or (lambda i: (lengths[i], i))):
        longest = max(longest, lengths[i])
        if not batches or (budget is not None and longest * (len(batches[-1]) + 1) > budget):
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


class TokenBudget:
    """The tokens that one forward pass may have, padding included; it only ever shrinks."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def within(self, run: Callable[[int], T]) -> T:
        """run(tokens), again with half of them whenever the device runs out of memory. ValueError where one row alone does not fit."""
        while True:
            try:
                return run(self.tokens)
            except torch.OutOfMemoryError as error:
                if self.tokens == 1:
                    raise ValueError(
                        "the device's memory is too small for one record: try -s optimization.gradient_checkpointing=true, fewer levels, "
                        "smaller images or --quantize 4bit"
                    ) from error
            self.tokens //= 2  # after the except block, which holds the failed attempt's tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def out_of_memory(section: str, tokens: int) -> Warning_:
    """What a run tells of a budget that has shrunk; `section` of the configuration holds the budget to start with."""
    return Warning_(
        "out_of_memory",
        f"the device ran out of memory; going on with {tokens} tokens a forward ({section}.token_budget={tokens} starts so)",
    )
