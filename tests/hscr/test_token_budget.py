"""Batches by token budget, and a device that runs out of memory."""

from __future__ import annotations

import pytest
import torch

from hscr.token_budget import TokenBudget, budget_batches


def test_batches_by_hand() -> None:
    """Sorted 1 2 3 5 9 in a budget of 8: 1·1, 2·2, 3·2 fit? {1,2}: 2·2 = 4; with 3: 3·3 = 9 > 8; {3}: with 5: 5·2 = 10 > 8; 9 alone."""
    assert budget_batches([5, 1, 9, 3, 2], 8) == [[1, 4], [3], [0], [2]]
    assert budget_batches([5, 1, 9, 3, 2], None) == [[1, 4, 3, 0, 2]]
    assert budget_batches([], 8) == []
    assert budget_batches([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]


def test_a_batch_counts_its_longest_row_whatever_the_order() -> None:
    """Kept in the given order: 4, 1 is 2·4 = 8; a third row would make 12."""
    assert budget_batches([4, 1, 1], 8, key=lambda i: i) == [[0, 1], [2]]


def test_half_the_budget_until_it_fits() -> None:
    tried = []

    def run(tokens: int) -> str:
        tried.append(tokens)
        if tokens > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    budget = TokenBudget(100)
    assert budget.within(run) == "done"
    assert tried == [100, 50, 25]
    assert budget.within(run) == "done"
    assert tried == [100, 50, 25, 25]  # it stays small


def test_one_record_that_does_not_fit_says_what_to_do() -> None:
    def run(tokens: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ValueError, match=r"too small for one record: try -s optimization\.gradient_checkpointing=true"):
        TokenBudget(64).within(run)


def test_another_failure_is_not_tried_again() -> None:
    def run(tokens: int) -> None:
        raise RuntimeError("shape mismatch")

    budget = TokenBudget(64)
    with pytest.raises(RuntimeError, match="shape"):
        budget.within(run)
    assert budget.tokens == 64
