"""What a policy made of an image, kept: keys and values of prompts up to and including their last visual token, across requests.

The next question on the image, by the same policy, begins behind it; so does the pass over the dropped prompt that grounds an answer. What
is kept is found by everything it depends on: policy, image, token ids and their positions (which tell which visual tokens were dropped),
and a salt that keeps callers apart. What follows the prefix cannot change it, for attention is causal there: bidirectional within an
image only, and every image of the prompt is in.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hscr.artifacts import bytes_digest
from hscr.lora_rows import LoraRows
from hscr.model import VLM
from hscr.prefix import Rows, empty_cache, joinable
from hscr.visual_tokens import Prompt

Layers = list[tuple[Tensor, Tensor]]  # a layer's keys and values [heads, T, d]


def prefix_length(prompt: Prompt) -> int:
    """Tokens up to and including the last visual one; 0 where the prompt has none."""
    visual = (prompt.input_ids == prompt.image_token_id).nonzero()
    return int(visual[-1]) + 1 if len(visual) else 0


class PrefixCache:
    """Prefixes by digest, least recently used out first, bounded in bytes. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.hits = self.misses = 0
        self._items: OrderedDict[str, Layers] = OrderedDict()

    def get(self, key: str) -> Layers | None:
        found = self._items.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._items.move_to_end(key)
        return found

    def put(self, key: str, layers: Layers) -> None:
        size = _n_bytes(layers)
        if key in self._items or size > self.max_bytes:
            return
        self._items[key] = layers
        self.n_bytes += size
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= _n_bytes(self._items.popitem(last=False)[1])


def prefix_key(prompt: Prompt, length: int, adapter: str | None, salt: str) -> str:
    """The name of a prompt's first `length` tokens as one policy sees them."""
    ids, positions = prompt.input_ids[:length], prompt.position_ids[..., :length].contiguous()
    parts = [repr((adapter, prompt.image, salt)).encode(), ids.numpy().tobytes(), positions.numpy().tobytes()]
    return bytes_digest(b"".join(bytes_digest(part).encode() for part in parts))


def begin(
    vlm: VLM,
    lora: LoraRows,
    cache: PrefixCache | None,
    prompts: Sequence[Prompt],
    tails: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    salts: Sequence[str],
) -> Rows:
    """Rows [prompt | tail], their prefixes taken from the cache or computed for it; the rest is the rows' next forward pass.

    Without a cache, or where the model's own cannot hold rows of any length (a stock sliding window), the whole prompt is.
    """
    lengths = [prefix_length(p) for p in prompts]
    if cache is None or not all(lengths) or not joinable(empty_cache(vlm)):
        return Rows(vlm, prompts, tails)
    keys = [prefix_key(*row) for row in zip(prompts, lengths, adapters, salts, strict=True)]
    held = {key: found for key in dict.fromkeys(keys) if (found := cache.get(key)) is not None}
    missing = [keys.index(key) for key in dict.fromkeys(keys) if key not in held]
    if missing:
        heads = [_head(prompts[i], lengths[i]) for i in missing]
        rows = Rows(vlm, heads, [()] * len(heads))
        with lora.rows([adapters[i] for i in missing]):
            rows.logits()
        layers: list[Any] = rows.cache.layers
        for at, i in enumerate(missing):
            n = lengths[i]
            made = [(layer.keys[at, :, -n:].clone(), layer.values[at, :, -n:].clone()) for layer in layers]
            held[keys[i]] = made
            cache.put(keys[i], made)
    return Rows.after(vlm, prompts, [held[key] for key in keys], tails)


def _head(prompt: Prompt, length: int) -> Prompt:
    return dataclasses.replace(
        prompt, input_ids=prompt.input_ids[:length], position_ids=prompt.position_ids[..., :length]
    )


def _n_bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)
