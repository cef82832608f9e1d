"""What a policy made of an image, kept: keys and values of prompts up to and including their last visual token, across requests.

The next question on the image, by the same policy, begins behind it; so does the pass over the dropped prompt that grounds an answer. What
is kept is found by everything it depends on: policy, image, token ids and their positions (which tell which visual tokens were dropped),
and a salt that keeps callers apart. What follows the prefix cannot change it, for attention is causal there: bidirectional within an
image only, and every image of the prompt is in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hscr.artifacts import bytes_digest
from hscr.lora_rows import LoraRows
from hscr.model import VLM
from hscr.plain_decoder import PlainDecoder, logits_of
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


@dataclass
class Begun:
    """Rows of one forward pass: their numbers among those asked for, and logits [n, last, V] of what follows their last columns."""

    numbers: list[int]
    rows: Rows
    logits: Tensor


def begin(
    vlm: VLM,
    lora: LoraRows,
    cache: PrefixCache | None,
    prompts: Sequence[Prompt],
    tails: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    salts: Sequence[str],
    last: int = 1,
    decoder: PlainDecoder | None = None,
    new: int = 0,
) -> list[Begun]:
    """Compute rows [prompt | tail] in at most two forward passes: whole where the prefix is not known, and kept; the others from behind it.

    Of rows with one prefix that nobody knows yet the first is computed whole, and the others go on from it. Without a cache, or where the
    model's own cannot hold rows of any length (a stock sliding window), all are computed whole. `new`: tokens that will follow, about.
    """
    lengths = [prefix_length(p) for p in prompts]
    if cache is None or not joinable(empty_cache(vlm)):
        lengths = [0] * len(prompts)
    keys = [prefix_key(p, n, a, s) if n else None for p, n, a, s in zip(prompts, lengths, adapters, salts, strict=True)]
    held = {key: cache.get(key) for key in dict.fromkeys(keys) if cache is not None and key is not None}
    made_by = {key: keys.index(key) for key, found in held.items() if found is None}
    whole = [i for i, key in enumerate(keys) if key is None or made_by.get(key) == i]
    behind = [i for i in range(len(prompts)) if i not in whole]

    def computed(numbers: list[int], rows: Rows) -> Begun:
        rows.prefixes = [(keys[i], lengths[i]) for i in numbers]
        with lora.rows([adapters[i] for i in numbers]):
            return Begun(numbers, rows, logits_of(rows, decoder, lora, last))

    begun = []
    if whole:
        begun.append(computed(whole, Rows(vlm, [prompts[i] for i in whole], [tails[i] for i in whole], new)))
        for at, i in enumerate(whole):
            if cache is not None and (key := keys[i]) is not None:
                held[key] = made = begun[0].rows.beginning(at, lengths[i])
                cache.put(key, made)
    if behind:
        known: list[Any] = [held[keys[i]] for i in behind]  # type: ignore[index]
        rows = Rows.after(vlm, [prompts[i] for i in behind], known, [tails[i] for i in behind], new)
        begun.append(computed(behind, rows))
    return begun


def _n_bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)
