"""Several answers to one prompt scored with the prompt, and all its visual tokens, computed once. Four routes, the same numbers.

A row a record, [prompt | y_1 | y_2 | …], with a tree mask and positions that restart after the prompt: each answer sees the prompt and
itself, never another answer. Packed: in one forward pass. Tree: the prompt first, under the plain causal mask, then the answers over its
cache (hscr/trees.py), which spares the mask of prompt × prompt. Rows: the same with the cache expanded to a row an answer, which spares the
mask of answer × answer, for long ones. Plain decoders in training on a CPU: hscr/adapted_decoder.py. The language-model head runs on answer
positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hscr.adapted_decoder import AdaptedDecoder
from hscr.block_attention import BLOCK, segment_blocks
from hscr.inputs import attention, image_inputs, tree_mask
from hscr.model import VLM
from hscr.plain_decoder import decoder_without_gradients, logits_of
from hscr.prefix import Rows, tokens_of
from hscr.trees import Prefixes, Trees, but_last, holds_trees
from hscr.visual_tokens import Prompt


def answer_logits(
    vlm: VLM,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    checkpointing: bool = False,
    blocks: bool = False,
) -> list[list[Tensor]]:
    """Logits that predict each answer's tokens, teacher-forced: for record b and its answer j a tensor [A_bj, V].

    `answers[b]` lists token ids of record b's answers. Differentiable in the adapter's weights. Layers that checkpoint gradients take no
    cache. `blocks`: packed, attention by blocks (hscr/block_attention.py). On a CPU most models take none of the
    routes below but hscr/adapted_decoder.py.
    """
    if blocks:
        return packed_logits(vlm, prompts, answers, blocks=True)
    if checkpointing or not holds_trees(vlm):
        return packed_logits(vlm, prompts, answers)
    if (decoder := AdaptedDecoder.of(vlm)) is not None:
        return decoder.answer_logits(prompts, answers)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for route, records in _routes(prompts, answers):
        found = route(vlm, [prompts[b] for b in records], [answers[b] for b in records])
        for b, group in zip(records, found, strict=True):
            logits[b] = group
    return logits


def _routes(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[Callable[..., list[list[Tensor]]], list[int]]]:
    """Each record's route, whichever batch it is in, for routes differ in bfloat16: rows where a tree would compute and hide more pairs of
    tokens than 64 for each token that expanding copies (they cost about the same, measured on a CPU: docs/performance.md)."""
    by_rows = []
    for b, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        hidden = sum(len(a) * (sum(map(len, group)) - len(a)) for a in group)
        if hidden > 64 * len(group) * len(prompt.input_ids):
            by_rows.append(b)
    by_tree = [b for b in range(len(prompts)) if b not in by_rows]
    return [(route, records) for route, records in ((row_logits, by_rows), (tree_logits, by_tree)) if records]


def packed_logits(
    vlm: VLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]], *, blocks: bool = False
) -> list[list[Tensor]]:
    """`answer_logits` by one packed row a record; with `blocks` attended by blocks, which a row of whole blocks needs."""
    rows = []
    for prompt, group in zip(prompts, answers, strict=True):
        n = len(prompt.input_ids)
        ids, positions, segments = [prompt.input_ids], [prompt.position_ids], [torch.zeros(n, dtype=torch.long)]
        index: list[Tensor] = []
        at = n
        for j, answer in enumerate(group, 1):
            a = len(answer)
            ids.append(torch.tensor(answer, dtype=torch.long))
            positions.append((prompt.next_position + torch.arange(a)).expand(*prompt.position_ids.shape[:-1], a))
            segments.append(torch.full((a,), j))
            # The first token is predicted by the prompt's last one, every other by its left neighbour.
            index.append(torch.cat([torch.tensor([n - 1]), torch.arange(at, at + a - 1)]))
            at += a
        rows.append((torch.cat(ids), torch.cat(positions, -1), torch.cat(segments), torch.cat(index)))
    width, kept = max(len(r[0]) for r in rows), max(len(r[3]) for r in rows)
    if blocks:
        width = -(-width // BLOCK) * BLOCK

    def padded(column: int, size: int, value: int) -> Tensor:
        """[B, size], or [3, B, size] for a column of three axes."""
        out = torch.full((*rows[0][column].shape[:-1], len(rows), size), value, dtype=torch.long)
        for b, row in enumerate(rows):
            out[..., b, : row[column].shape[-1]] = row[column]
        return out.to(vlm.device)

    input_ids, position_ids = padded(0, width, vlm.eos_id), padded(1, width, 0)
    whose = padded(2, width, -1)
    mask: Any = segment_blocks(whose) if blocks else attention(vlm, tree_mask(whose), input_ids, position_ids)
    logits = vlm.model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=False,
        logits_to_keep=padded(3, kept, 0),
        **image_inputs(vlm, prompts),
    ).logits
    out = []
    for b, group in enumerate(answers):
        sizes = [len(a) for a in group]
        out.append(list(logits[b, : sum(sizes)].split(sizes)))
    return out


def tree_logits(vlm: VLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> list[list[Tensor]]:
    """`answer_logits` by a tree over the prompt's cache."""
    rows = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
    # The last token of an answer predicts nothing that is asked for.
    made = iter(Trees(vlm, [p for p, _ in rows], [a[:-1] for _, a in rows]).path_logits())
    return [[next(made) for _ in group] for group in answers]


def row_logits(vlm: VLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> list[list[Tensor]]:
    """`answer_logits` by the prompt's cache, expanded to a row an answer."""
    rows = but_last(vlm, prompts)
    rows.keep([b for b, group in enumerate(answers) for _ in group])
    tails = [(p, a[:-1]) for p, group in zip(prompts, answers, strict=True) for a in group]
    logits = rows.extend([tokens_of(p, len(p.input_ids) - 1, tail) for p, tail in tails])
    made = iter([own[-1 - len(tail) :] for own, (_, tail) in zip(logits, tails, strict=True)])
    return [[next(made) for _ in group] for group in answers]


def remembered_logits(
    vlm: VLM, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], prefixes: Prefixes
) -> list[Tensor]:
    """Logits [A, V] that predict one answer a prompt, in rows that `prefixes` remembers for what else is asked of the prompts."""
    tails, longest = [a[:-1] for a in answers], max(map(len, answers))
    rows = Rows(vlm, prompts, tails)
    logits = logits_of(rows, decoder_without_gradients(vlm), last=longest)
    if holds_trees(vlm):
        prefixes.put(prompts, tails, rows.cache)
    return [own[longest - len(a) :] for own, a in zip(logits, answers, strict=True)]


def token_logprobs(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """log π(y_t | …) [A] in float32 from logits [A, V] and the answer's ids [A]."""
    target = torch.tensor(ids, dtype=torch.long, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(-1, target).squeeze(-1)
