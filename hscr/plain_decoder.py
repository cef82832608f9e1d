"""A pass through a decoder of the plain kind, over padded caches: steps of serving and of generation, and what is computed around them.

In a step of a few rows the stock forward spends most of its time outside of matrix products: six small kernels a norm, three products for
queries, keys and values, masks in two forms, hooks of adapters. Here a layer is about twenty kernels, adapters included, and numbers are
the stock forward's but for the order of sums. Plain is Llama's layer (Touvron et al. 2023, arXiv 2302.13971) and what differs from it by
biases, shared heads or norms of queries and keys; whatever is not known to be, takes the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from hscr.families import handed_with_deepstack
from hscr.grouped_attention import grouped_sdpa
from hscr.lora_rows import LoraRows
from hscr.model import VLM
from hscr.prefix import Rows, seen
from hscr.shared_prefix import Sharing, sharing
from hscr.static_steps import StaticSteps, cuda_graph

PLAIN = frozenset(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2_5_VL", "Qwen3VLText"))
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class _Joint:
    """Linear layers with one input, by the names of their modules, as one: weight [sum of outputs, in], their own being views of it."""

    names: tuple[str, ...]
    outs: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None


class _Norm:
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) of [..., D], as the module has it."""

    def __init__(self, module: Any) -> None:
        self.weight, self.eps = module.weight.data, module.variance_epsilon
        self.plain = self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"
        if self.plain:  # there torch's own is six kernels, and this four: x·√D·w / √(|x|² + D·ε)
            d = self.weight.shape[0]
            self.scaled = self.weight * d**0.5
            self.least = torch.full((), (d * self.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.plain:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self.least)).mul_(self.scaled)


@dataclass
class _Layer:
    first: _Norm  # before attention
    qkv: _Joint
    attention: Any
    norms: tuple[_Norm, _Norm] | None  # of queries and keys, where it has them
    out: _Joint
    second: _Norm  # before the MLP
    gate_up: _Joint
    act: Any
    down: _Joint


class PlainDecoder:
    """The decoder of a model; its weights stay the model's own."""

    def __init__(self, vlm: VLM, name: str, decoder: Any) -> None:
        self.decoder, self.head = decoder, vlm.base.lm_head
        self.layers = [_layer(f"{name}.layers.{i}", layer) for i, layer in enumerate(decoder.layers)]
        self.norm = _Norm(decoder.norm)
        self.names = {n for x in self.layers for joint in (x.qkv, x.out, x.gate_up, x.down) for n in joint.names}
        attention = decoder.layers[0].self_attn
        self.d = attention.head_dim
        self.deepstack = vlm.family.hand_over is handed_with_deepstack
        self.heads = attention.q_proj.out_features // self.d
        self.groups = attention.k_proj.out_features // self.d
        self.steps: StaticSteps | None = None  # where steps of one token may be captured

    @classmethod
    def of(cls, vlm: VLM) -> PlainDecoder | None:
        """None where the model's decoder is not known to be plain: a layer of another kind, quantized, or changed by peft."""
        name, decoder = next(
            (n, m) for n, m in vlm.base.named_modules() if n.split(".")[-1] == vlm.family.language_model
        )
        if vlm.family.masks is not None or not _is_plain(decoder):
            return None
        made = cls(vlm, name, decoder)
        if vlm.static_steps is None and vlm.device.type == "cuda":
            vlm.static_steps = StaticSteps(cuda_graph)
        made.steps = vlm.static_steps
        return made

    def takes(self, rows: Rows, lora: LoraRows | None) -> bool:
        """Whether the new columns of these rows can go through here: features enter at the first layer only, adapters on these layers."""
        return not (rows.images and self.deepstack) and (lora is None or lora.only_changes(self.names))

    def logits(self, rows: Rows, lora: LoraRows | None, last: int) -> Tensor:
        """Logits [n, last, V] of what follows each of the last columns, as Rows.logits."""
        if self.steps is None or rows.new > 1 or rows.images:
            return self._rows_logits(rows, lora, last)
        return self.steps.logits(
            lambda: self._rows_logits(rows, lora, last),
            self,
            rows.ids[:, -1:],
            rows.positions[..., -1:],
            seen(rows.mask, 1),
            rows.cache,
            lora,
        )

    def _rows_logits(self, rows: Rows, lora: LoraRows | None, last: int) -> Tensor:
        x, new = self._embedded(rows), rows.new
        shared = sharing(rows, x.dtype)
        positions = rows.positions[..., -new:]
        x = self._passed(x, positions, rows.cache, lora, last, lambda q: _mask(rows, q, x.dtype), shared)
        rows.images = ()
        logits: Tensor = self.head(x)
        return logits

    def column_logits(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: DynamicCache,
        keep: Tensor | None = None,
        *,
        step: bool = False,
    ) -> Tensor:
        """Logits [n, T, V] of what follows new columns [n, T] of text, which see `visible` bool [n, 1, T, K]; `keep` [n, k]: these only.

        `step`: it is one of many with columns of the same shape.
        """

        def plain() -> Tensor:
            return self.pass_columns(ids, positions, cache, _added(visible, self.head.weight.dtype), None, keep)

        if self.steps is None or not step or keep is not None:
            return plain()
        return self.steps.logits(plain, self, ids, positions, visible, cache, None)

    def pass_columns(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Any,
        mask: Tensor,
        lora: Any,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Logits [n, T, V] behind new columns [n, T] of text over a cache, `mask` [n, 1, T, K] added to what they look at."""
        x: Tensor = self.decoder.embed_tokens(ids)
        x = self._passed(x, positions, cache, lora, ids.shape[1], lambda q: mask)
        logits: Tensor = self.head(x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1])))
        return logits

    def _passed(
        self,
        x: Tensor,
        positions: Tensor,
        cache: DynamicCache,
        lora: LoraRows | None,
        last: int,
        mask_of: Callable[[int], Tensor | None],
        shared: Sharing | None = None,
    ) -> Tensor:
        """The last columns [n, last, D] of x [n, T, D] behind all layers and the norm; `mask_of` gives the last q columns' mask."""
        n, new = x.shape[:2]
        cos, sin = (t.unsqueeze(2) for t in self.decoder.rotary_emb(x, positions))  # [n, T, 1, d]
        half = self.d // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # so that a half turned round needs no sign
        mask = mask_of(new) if shared is None else None
        caches: list[Any] = cache.layers
        for layer, held in zip(self.layers, caches, strict=True):
            states = _linear(lora, layer.qkv, layer.first(x)).view(n, new, -1, self.d)
            turned = self._turned(layer, states[:, :, : self.heads + self.groups], cos, sin)
            queries, values = turned[:, :, : self.heads], states[:, :, self.heads + self.groups :]
            keys, values = held.update(turned[:, :, self.heads :].transpose(1, 2), values.transpose(1, 2))
            if layer is self.layers[-1] and last < new:  # of the others nobody asks for more than keys and values
                x, queries, mask = x[:, -last:], queries[:, -last:], mask_of(last)
            if shared is not None:
                own = queries.reshape(n, self.groups, self.heads // self.groups, self.d)
                attended = shared.attention(own, keys, values, layer.attention.scaling).reshape(n, 1, -1)
            else:
                attended = self._attended(layer.attention, queries, keys, values, mask)
            x += _linear(lora, layer.out, attended)
            gate, up = _linear(lora, layer.gate_up, layer.second(x)).chunk(2, -1)
            x += _linear(lora, layer.down, layer.act(gate).mul_(up))
        return self.norm(x)

    def _embedded(self, rows: Rows) -> Tensor:
        """[n, new, D] of the new columns, features in the places of visual tokens."""
        ids = rows.ids[:, -rows.new :]
        features = [p.features for p in rows.images if p.features is not None and len(p.features)]
        if not features:
            x: Tensor = self.decoder.embed_tokens(ids)
            return x
        visual = ids == rows.images[0].image_token_id
        x = self.decoder.embed_tokens(ids.masked_fill(visual, 0))  # an image token may lie outside the vocabulary
        return x.masked_scatter(visual[..., None], torch.cat(features).to(x.dtype))

    def _turned(self, layer: _Layer, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys [n, new, heads, d] at their positions (rotary embedding, Su et al. 2021, arXiv 2104.09864)."""
        if layer.norms is not None:
            of_queries, of_keys = layer.norms
            queries, keys = states.split([self.heads, self.groups], 2)
            states = torch.cat([of_queries(queries), of_keys(keys)], 2)
        return torch.addcmul(states * cos, states.roll(self.d // 2, -1), sin)

    def _attended(self, attention: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[n, Q, heads · d] of queries [n, Q, heads, d], keys and values [n, groups, K, d], mask [n, 1, Q, K] or none."""
        n, q = queries.shape[:2]
        if q == 1:  # heads that share keys become queries of one head, without a copy
            own = queries.reshape(n, self.groups, self.heads // self.groups, self.d)
            out = F.scaled_dot_product_attention(own, keys, values, mask, scale=attention.scaling)
        else:
            out, _ = grouped_sdpa(attention, queries.transpose(1, 2), keys, values, mask, scaling=attention.scaling)
        return out.reshape(n, q, -1)


def _mask(rows: Rows, q: int, dtype: torch.dtype) -> Tensor | None:
    """What the last q columns may look at, to be added [n, 1, q, K]; none where plain causal attention says it."""
    if rows.new == rows.mask.shape[1] and not any(rows.first) and q in (1, rows.new):
        return None
    return _added(seen(rows.mask, q), dtype)


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def decoder_without_gradients(vlm: VLM) -> PlainDecoder | None:
    """For a pass of which no gradient is asked; none where one is, or the model's decoder is not plain."""
    return None if torch.is_grad_enabled() else PlainDecoder.of(vlm)


def logits_of(rows: Rows, decoder: PlainDecoder | None, lora: LoraRows | None = None, last: int = 1) -> Tensor:
    """Rows.logits, through the decoder where it takes them. Call it within `LoraRows.rows`."""
    if decoder is not None and decoder.takes(rows, lora):
        return decoder.logits(rows, lora, last)
    return rows.logits(last)


def _linear(lora: LoraRows | None, joint: _Joint, x: Tensor) -> Tensor:
    out = F.linear(x, joint.weight, joint.bias)
    added = lora.joint(joint.names, joint.outs) if lora is not None else None
    if added is None:
        return out
    down, up, mask = added
    hidden = F.linear(x.to(down.dtype), down)
    hidden = hidden if mask is None else hidden * mask
    if out.dtype != down.dtype:
        return (out + hidden @ up).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), up)
    return out


def _is_plain(decoder: Any) -> bool:
    if decoder.config._attn_implementation not in ("sdpa", "grouped_sdpa"):
        return False
    return all(
        type(layer).__name__ in PLAIN
        and all(type(m) is torch.nn.Linear for name in NAMES for m in [part_of(layer, name)])
        for layer in decoder.layers
    )


def part_of(layer: Any, name: str) -> Any:
    """A layer's linear module, one of NAMES."""
    return getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)


def _layer(name: str, layer: Any) -> _Layer:
    def joint(part: str, *names: str) -> _Joint:
        return joined([f"{name}.{part}.{n}" for n in names], [part_of(layer, n) for n in names])

    attention = layer.self_attn
    return _Layer(
        _Norm(layer.input_layernorm),
        joint("self_attn", "q_proj", "k_proj", "v_proj"),
        attention,
        (_Norm(attention.q_norm), _Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        joint("self_attn", "o_proj"),
        _Norm(layer.post_attention_layernorm),
        joint("mlp", "gate_proj", "up_proj"),
        layer.mlp.act_fn,
        joint("mlp", "down_proj"),
    )


def joined(names: Sequence[str], layers: Sequence[torch.nn.Linear]) -> _Joint:
    """Lay weights one after the other, the layers' own becoming views of them: no second copy stays.

    On a CPU in float32 input by input: there products of a few narrow rows are a quarter faster so (decision 0105). In half precision they
    are ten times slower.
    """
    outs = tuple(layer.out_features for layer in layers)
    weights = [layer.weight.data for layer in layers]
    first, size = weights[0], (sum(outs), weights[0].shape[1])
    by_input = first.device.type == "cpu" and first.dtype == torch.float32
    strides = (1, size[0]) if by_input else (size[1], 1)
    starts = [first.data_ptr() + sum(outs[:i]) * strides[0] * first.itemsize for i in range(len(outs))]
    one_storage = len({w.untyped_storage().data_ptr() for w in weights}) == 1
    if one_storage and all(w.stride() == strides and w.data_ptr() == s for w, s in zip(weights, starts, strict=True)):
        whole = first.as_strided(size, strides)  # they lie so already
    else:
        whole = torch.cat(weights)
        if by_input:
            whole = whole.T.contiguous().T
        for layer, part in zip(layers, whole.split(outs), strict=True):
            layer.weight.data = part
            layer.register_state_dict_post_hook(_row_by_row)
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    return _Joint(tuple(names), outs, whole, bias)


def _row_by_row(layer: torch.nn.Linear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """What is saved of a layer is laid as everybody expects: safetensors takes nothing else."""
    name = prefix + "weight"
    state[name] = state[name].contiguous()
