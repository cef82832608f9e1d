"""Attention of answers to their prompt and to themselves, forward and backward, without a mask: on a CPU.

A prompt's tokens see each other causally; an answer's see the prompt and, causally, themselves. Each of these is a call of the plain
kernel, which skips what is not seen. What an answer sees in two calls is merged by their log-sum-exps (Milakov and Gimelshein 2018, arXiv
1805.02867), and each call's backward is the kernel's own, given the merged sum: it needs the probabilities exp(q·k − lse) and nothing
else of the other call (Dao et al. 2022, arXiv 2205.14135, appendix B.2). H heads, G of keys and values, d wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Layout:
    """Where the tokens of R records stand among T, [all prompts | all answers]: record r's prompt, and its answers one after the other."""

    prompts: tuple[slice, ...]
    answers: tuple[tuple[slice, ...], ...]

    @classmethod
    def of(cls, prompts: list[int], answers: list[list[int]]) -> Layout:
        """From the numbers of tokens."""
        ends = list(accumulate([*prompts, *(n for own in answers for n in own)], initial=0))
        spans = iter([slice(start, end) for start, end in pairwise(ends)])
        return cls(tuple(next(spans) for _ in prompts), tuple(tuple(next(spans) for _ in own) for own in answers))

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts."""
        return self.prompts[-1].stop


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [Q, H, d] and log-sum-exps [Q, H] of queries [Q, H, d] over keys and values [T, G, d]; Q is T, or the answers' tokens."""
    gone = len(k) - len(q)
    k, v = _for_every_head(k, q.shape[1]), _for_every_head(v, q.shape[1])
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])

    def seen(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
        o, s = _flash(_heads(q[queries]), _heads(k[keys]), _heads(v[keys]), 0.0, causal, scale=scale)
        return o[0].transpose(0, 1), s[0].transpose(0, 1)

    for prompt, answers in zip(layout.prompts, layout.answers, strict=True):
        if not gone:
            out[prompt], lse[prompt] = seen(prompt, prompt, True)
        together = _moved(slice(answers[0].start, answers[-1].stop), gone)
        of_prompt, its_sum = seen(together, prompt, False)
        for answer in answers:
            at = _moved(answer, gone)
            out[at], lse[at] = seen(at, answer, True)
        whole = torch.logaddexp(its_sum, lse[together])
        out[together] *= (lse[together] - whole).exp_()[..., None]
        out[together].addcmul_(of_prompt, (its_sum - whole).exp_()[..., None])
        lse[together] = whole
    return out, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients [Q, H, d] of the queries and [T, 2, G, d] of keys and values, from that of the outputs and what `attend` gave."""
    gone, (t, g, d) = len(k) - len(q), k.shape
    k, v = _for_every_head(k, q.shape[1]), _for_every_head(v, q.shape[1])
    dq, dkv = torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_zeros(t, 2, *q.shape[1:])

    def add(queries: slice, keys: slice, causal: bool) -> None:
        given = [_heads(x) for x in (grad[queries], q[queries], k[keys], v[keys], out[queries])]
        made = _flash_backward(*given, lse[queries].transpose(0, 1)[None], 0.0, causal, scale=scale)
        for whole, part in zip((dq[queries], dkv[keys, 0], dkv[keys, 1]), made, strict=True):
            whole += part[0].transpose(0, 1)

    for prompt, answers in zip(layout.prompts, layout.answers, strict=True):
        if not gone:
            add(prompt, prompt, True)
        add(_moved(slice(answers[0].start, answers[-1].stop), gone), prompt, False)
        for answer in answers:
            add(_moved(answer, gone), answer, True)
    return dq, dkv if g == q.shape[1] else dkv.view(t, 2, g, -1, d).sum(3)


def _heads(x: Tensor) -> Tensor:
    """[T, H, d] as [1, H, T, d]."""
    return x.transpose(0, 1)[None]


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """[T, G, d] as [T, heads, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _moved(at: slice, by: int) -> slice:
    return slice(at.start - by, at.stop - by)
