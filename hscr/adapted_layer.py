"""The two halves of a plain decoder layer with LoRA beside frozen weights, forward and backward by hand: for training on a CPU.

Autograd over the stock layer keeps some thirty tensors a layer and computes LoRA's small products apart. Here B·A is added to a copy of the
weight, which costs what r tokens would, so that a forward is the base's; and what is kept is the halves' inputs with 1 / RMS, queries and
keys (before their norms too, where they have them), values, attention's output and log-sum-exps, and the MLP's two products: everything
else is computed again in passes over memory that cost less than keeping it. T tokens without padding, D wide. Models and records are
hscr/adapted_decoder.py's, who sees whom is hscr/prompt_attention.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hscr.prompt_attention import Layout, attend, attend_backward

Lora = Sequence[Tensor | None]  # A [r, in] and B [out, r] of each of some linear layers in turn, none where it has none


@dataclass(frozen=True)
class Adapted:
    """Linear layers with one input as one: frozen weight [sum of outs, in] and bias, and each one's outputs and LoRA scale s."""

    weight: Tensor
    bias: Tensor | None
    outs: tuple[int, ...]
    scales: tuple[float, ...]

    def merged(self, lora: Lora) -> Tensor:
        """W + s·B·A."""
        if all(x is None for x in lora):
            return self.weight
        weight = self.weight.clone()
        for part, a, b, s in zip(weight.split(self.outs), lora[::2], lora[1::2], self.scales, strict=True):
            if a is not None and b is not None:
                part.addmm_(b, a, alpha=s)
        return weight

    def __call__(self, x: Tensor, lora: Lora) -> Tensor:
        return F.linear(x, self.merged(lora), self.bias)

    def backward(self, grad: Tensor, x: Tensor, lora: Lora) -> list[Tensor | None]:
        """Gradients of A and B of each layer, from that of the outputs [T, sum of outs]. With y = x·(W + s·B·A)ᵀ:
        dA = s·(dy·B)ᵀ·x and dB = s·dyᵀ·(x·Aᵀ)."""
        made: list[Tensor | None] = []
        for own, a, b, s in zip(grad.split(self.outs, 1), lora[::2], lora[1::2], self.scales, strict=True):
            if a is None or b is None:
                made += [None, None]
            else:
                made += [((own @ b).T @ x).mul_(s), (own.T @ (x @ a.T)).mul_(s)]
        return made


@dataclass(frozen=True)
class AttentionPart:
    """The modules of a layer's first half: weight [D] of its norm, those [d] of the norms of queries and keys where the family has them;
    q [D → H·d], k and v as one [D → 2·G·d], the output's [H·d → D]."""

    norm: Tensor
    norms: tuple[Tensor, Tensor] | None
    eps: float
    q: Adapted
    kv: Adapted
    out: Adapted
    head_dim: int
    scale: float


@dataclass(frozen=True)
class MLPPart:
    """The modules of a layer's second half: weight [D] of its norm, gate and up as one [D → 2·I], down [I → D]."""

    norm: Tensor
    eps: float
    gate_up: Adapted
    down: Adapted


class AttentionHalf(Function):
    """x [T, D] → x + attention(norm(x)) of the tokens from `gone` on: the last layer goes on with answers only, [T − gone, D].

    cos, sin [T, 1, d], the latter's first half negated. `lora`: of q, k, v and the output in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: AttentionPart, layout: Layout, gone: int, cos: Tensor, sin: Tensor, *lora: Any
    ) -> Tensor:
        n, rstd = normed(x, part.norm, part.eps)
        q = part.q(n[gone:], lora[:2]).view(len(x) - gone, -1, part.head_dim)
        k, v = part.kv(n, lora[2:6]).view(len(x), 2, -1, part.head_dim).unbind(1)
        before: list[Tensor] = []
        if part.norms is not None:
            before = [q, k]
            q, k = (normed(t, w, part.eps)[0] for t, w in zip(before, part.norms, strict=True))
        turn_(q, cos[gone:], sin[gone:])
        turn_(k, cos, sin)
        out, lse = attend(q, k, v, layout, part.scale)
        ctx.save_for_backward(*lora, x, rstd, q, k, v, out, lse, cos, sin, *before)
        ctx.part, ctx.layout, ctx.gone = part, layout, gone
        return part.out(out.flatten(1), lora[6:]).add_(x[gone:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), part, gone, saved = grads, ctx.part, ctx.gone, ctx.saved_tensors
        lora, (x, rstd, q, k, v, out, lse, cos, sin, *before) = saved[:8], saved[8:]
        of_out = part.out.backward(grad, out.flatten(1), lora[6:])
        dout = (grad @ part.out.merged(lora[6:])).view(q.shape)
        dq, dkv = attend_backward(dout, q, k, v, out, lse, ctx.layout, part.scale)
        turn_back_(dq, cos[gone:], sin[gone:])
        turn_back_(dkv[:, 0], cos, sin)
        if before:
            dq = normed_backward(dq, before[0], _rstd(before[0], part.eps), part.norms[0])
            dkv[:, 0] = normed_backward(dkv[:, 0], before[1], _rstd(before[1], part.eps), part.norms[1])
        dq, dkv = dq.flatten(1), dkv.flatten(1)
        n = (x * rstd).mul_(part.norm)
        of_in = [*part.q.backward(dq, n[gone:], lora[:2]), *part.kv.backward(dkv, n, lora[2:6])]
        dx = None
        if ctx.needs_input_grad[0]:
            dn = dkv @ part.kv.merged(lora[2:6])
            dn[gone:].addmm_(dq, part.q.merged(lora[:2]))
            dx = normed_backward(dn, x, rstd, part.norm)
            dx[gone:] += grad
        return dx, None, None, None, None, None, *of_in, *of_out


class MLPHalf(Function):
    """x [T, D] → x + down(silu(gate) · up) behind a norm. `lora`: of gate, up and down in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: MLPPart, *lora: Any) -> Tensor:
        n, rstd = normed(x, part.norm, part.eps)
        gate_up = part.gate_up(n, lora[:4])
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(*lora, x, rstd, gate_up)
        ctx.part = part
        return part.down(F.silu(gate).mul_(up), lora[4:]).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), part, saved = grads, ctx.part, ctx.saved_tensors
        lora, (x, rstd, gate_up) = saved[:6], saved[6:]
        gate, up = gate_up.chunk(2, -1)
        dh = grad @ part.down.merged(lora[4:])
        h = F.silu(gate)
        both = torch.empty_like(gate_up)
        torch.mul(dh, h, out=both[:, up.shape[1] :])
        of_down = part.down.backward(grad, h.mul_(up), lora[4:])
        both[:, : up.shape[1]] = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        n = (x * rstd).mul_(part.norm)
        of_gate_up = part.gate_up.backward(both, n, lora[:4])
        dx = normed_backward(both @ part.gate_up.merged(lora[:4]), x, rstd, part.norm).add_(grad)
        return dx, None, *of_gate_up, *of_down


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm of [..., D] (Zhang and Sennrich 2019, arXiv 1910.07467), and 1 / RMS [..., 1]."""
    rstd = _rstd(x, eps)
    return (x * rstd).mul_(weight), rstd


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / RMS [..., 1] of x [..., D]."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


def normed_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """dx [..., D] = r·g − x·r³·mean(g·x) with g = dy·w, r = 1 / RMS [..., 1], w [D]."""
    g = grad * weight
    mean = (g * x).mean(-1, keepdim=True).mul_(rstd**3)
    return g.mul_(rstd).addcmul_(x, mean, value=-1)


def turn_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of [T, H, d] in place (Su et al. 2021, arXiv 2104.09864)."""
    turned = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(turned, sin)


def turn_back_(grad: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The transpose of `turn_`."""
    turned = (grad * sin).roll(grad.shape[-1] // 2, -1)
    grad.mul_(cos).add_(turned)
