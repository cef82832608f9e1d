"""Answers scored in training and for its reference: through a plain decoder with peft's LoRA on it, on a CPU in float32.

[all prompts | all answers] of a batch are one list of tokens, so nothing is padding. Of the last layer, prompts have keys and values only:
nobody asks what follows them. Numbers are the stock forward's and autograd's but for the order of sums; whatever is not known to be
plain (hscr/plain_decoder.py), has another adapter than LoRA, another precision or device, takes another route of hscr/packing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from hscr.adapted_layer import Adapted, AttentionHalf, AttentionPart, MLPHalf, MLPPart
from hscr.model import VLM
from hscr.plain_decoder import NAMES, PLAIN, joined, part_of
from hscr.prompt_attention import Layout
from hscr.visual_tokens import Prompt


class AdaptedDecoder:
    """The decoder of a model with the adapter that is on it now, if it is on."""

    def __init__(self, vlm: VLM, decoder: Any) -> None:
        self.vlm, self.decoder = vlm, decoder
        self.layers = [_layer(layer) for layer in decoder.layers]

    @classmethod
    def of(cls, vlm: VLM) -> AdaptedDecoder | None:
        """None where the model is not known to be plain."""
        decoder = vlm.decoder
        return cls(vlm, decoder) if vlm.family.masks is None and _is_plain(vlm, decoder) else None

    def answer_logits(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """Logits [A, V] that predict each answer's tokens. Differentiable in the adapter's weights.

        An answer's tokens here are the prompt's last and its own but the last: the prompt's are those before.
        """
        layout = Layout.of([len(p.input_ids) - 1 for p in prompts], [[len(a) for a in own] for own in answers])
        ids = [p.input_ids[:-1] for p in prompts]
        positions = [p.position_ids[..., :-1] for p in prompts]
        for prompt, own in zip(prompts, answers, strict=True):
            for answer in own:
                ids.append(torch.tensor([int(prompt.input_ids[-1]), *answer[:-1]]))
                at = prompt.next_position - 1 + torch.arange(len(answer))
                positions.append(at.expand(*prompt.position_ids.shape[:-1], -1))
        x, deeper, visual = self._embedded(torch.cat(ids), prompts)
        cos, sin = (
            t.squeeze(0).unsqueeze(1) for t in self.decoder.rotary_emb(x[None], torch.cat(positions, -1).unsqueeze(-2))
        )
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for number, (attention, mlp, lora) in enumerate(self.layers):
            gone = layout.n_prompt if number == len(self.layers) - 1 else 0
            x = AttentionHalf.apply(x, attention, layout, gone, cos, sin, *lora[:8])
            x = MLPHalf.apply(x, mlp, *lora[8:])
            if number < len(deeper) and not gone:  # behind the last layer only answers are left
                x = x.index_add(0, visual, deeper[number])
        logits = self.vlm.base.lm_head(self.decoder.norm(x))
        made = iter(logits.split([len(a) for own in answers for a in own]))
        return [[next(made) for _ in own] for own in answers]

    def _embedded(self, ids: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """[T, D] of the tokens, features in the places of visual tokens; features of deeper layers, and those places."""
        visual = (ids == self.vlm.image_token_id).nonzero().squeeze(1)
        x: Tensor = self.decoder.embed_tokens(
            ids.index_fill(0, visual, 0)
        )  # an image token may lie outside the vocabulary
        features = [p.features for p in prompts if p.features is not None]
        if not len(visual):
            return x, (), visual
        first, *deeper = torch.cat(features).split(x.shape[-1], -1)
        return x.index_copy(0, visual, first), deeper, visual


def kept_bytes(vlm: VLM) -> int | None:
    """Bytes a token that a layer keeps here for its backward pass, and None where another route trains the model, from shapes alone.

    Both halves' inputs and 1 / RMS, queries and keys (before their norms too), values, attention's output and log-sum-exps, gate and up.
    """
    if vlm.family.masks is not None or not _are_plain(vlm.decoder):
        return None
    attention, mlp = vlm.decoder.layers[0].self_attn, vlm.decoder.layers[0].mlp
    q, k = attention.q_proj.out_features, attention.k_proj.out_features
    normed = q + k if hasattr(attention, "q_norm") else 0
    heads = q // attention.head_dim
    floats = 2 * (mlp.gate_proj.in_features + 1) + 2 * q + 2 * k + normed + heads + 2 * mlp.gate_proj.out_features
    return 4 * int(floats)


def _is_plain(vlm: VLM, decoder: Any) -> bool:
    linear = [part_of(layer, name) for layer in decoder.layers for name in NAMES] if _are_plain(decoder) else []
    return (
        bool(linear)
        and vlm.device.type == "cpu"
        and type(vlm.base.lm_head) is torch.nn.Linear
        and all(_is_linear(m) for m in linear)
        and all(not p.requires_grad or ".lora_" in n for n, p in decoder.named_parameters())  # no others get gradients
        and decoder.config._attn_implementation in ("sdpa", "grouped_sdpa")
    )


def _are_plain(decoder: Any) -> bool:
    return all(
        type(layer).__name__ in PLAIN and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        for layer in decoder.layers
    )


def _is_linear(module: Any) -> bool:
    """A float32 linear layer, alone or with one plain LoRA of peft's beside it."""
    if isinstance(module, LoraLinear):
        names = _active(module)
        odd = module.merged or module.fan_in_fan_out or module.lora_variant or any(module.lora_bias.values())
        drops = [module.lora_dropout[n] for n in names]
        dropout = any(m.training and type(m) is not torch.nn.Identity for m in drops)  # in eval mode it does nothing
        if odd or dropout or len(names) > 1:
            return False
        module = module.base_layer
    return type(module) is torch.nn.Linear and module.weight.dtype == torch.float32


def _active(module: Any) -> list[str]:
    return [] if module.disable_adapters else [n for n in module.active_adapters if n in module.lora_A]


def _layer(layer: Any) -> tuple[AttentionPart, MLPPart, list[Tensor | None]]:
    """Both halves, and A [r, in] and B [out, r] of its seven linear layers in turn, none where one has no LoRA."""
    lora: list[Tensor | None] = []
    scales = {}
    for name in NAMES:
        module = part_of(layer, name)
        own = _active(module)[0] if isinstance(module, LoraLinear) and _active(module) else None
        lora += [None, None] if own is None else [module.lora_A[own].weight, module.lora_B[own].weight]
        scales[name] = 0.0 if own is None else module.scaling[own]

    def adapted(*names: str) -> Adapted:
        joint = joined(names, [getattr(m, "base_layer", m) for m in (part_of(layer, name) for name in names)])
        return Adapted(joint.weight, joint.bias, joint.outs, tuple(scales[name] for name in names))

    attention, qkv = layer.self_attn, adapted(*NAMES[:3])
    q, kv = (
        Adapted(w, b, qkv.outs[part], qkv.scales[part])
        for w, b, part in zip(
            (qkv.weight[: qkv.outs[0]], qkv.weight[qkv.outs[0] :]),
            (None, None) if qkv.bias is None else (qkv.bias[: qkv.outs[0]], qkv.bias[qkv.outs[0] :]),
            (slice(1), slice(1, 3)),
            strict=True,
        )
    )
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    return (
        AttentionPart(
            first.weight,
            norms,
            first.variance_epsilon,
            q,
            kv,
            adapted(NAMES[3]),
            attention.head_dim,
            attention.scaling,
        ),
        MLPPart(second.weight, second.variance_epsilon, adapted(*NAMES[4:6]), adapted(NAMES[6])),
        lora,
    )
