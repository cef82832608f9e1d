"""What a model's decoder costs on a device, before the model is there: two of its layers with random weights and LoRA, timed.

Time and memory grow with layers and tokens in proportion, so two layers tell about all. The real class of the family is timed, with its own
attention, so nothing about an architecture is assumed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

from hscr.config import OptimizationConfig
from hscr.model import VLM

LAYERS = 2
SECONDS = 0.3  # of timing a figure, where one run takes less


class Probe:
    """Two decoder layers of `vlm`'s sizes on `device`; all figures are per layer. `vlm` may be without weights (hscr/plan.py)."""

    def __init__(self, vlm: VLM, config: OptimizationConfig, device: torch.device, dtype: torch.dtype) -> None:
        own = vlm.base.config.get_text_config()
        small = copy.deepcopy(own)
        small.num_hidden_layers, small.vocab_size, small.pad_token_id = LAYERS, 8, None
        if getattr(own, "layer_types", None):
            small.layer_types = own.layer_types[:LAYERS]
        kind = type(vlm.decoder)
        with torch.device(device):
            decoder = kind(small)
        decoder = torch.nn.Module.to(decoder, dtype).eval().requires_grad_(False)
        targets = [n for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        self.decoder: Any = get_peft_model(decoder, lora)
        self.device, self.dtype, self.hidden = device, dtype, own.hidden_size
        self.kv_heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        self.head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        self.masks_by_kind = vlm.family.masks is not None

    def forward_s(self, rows: int, tokens: int) -> float:
        """Seconds of the base's forward without gradients, rows × tokens."""
        with torch.no_grad(), self.decoder.disable_adapter():
            return self._timed(lambda: self._run(rows, tokens)) / LAYERS

    def step_s(self, rows: int, tokens: int) -> float:
        """Seconds of a forward and a backward into the adapter."""

        def step() -> None:
            self._run(rows, tokens, leaf=True).float().pow(2).mean().backward()
            self.decoder.zero_grad(set_to_none=True)

        return self._timed(step) / LAYERS

    def decode_s(self, rows: int, held: int) -> float:
        """Seconds of one of the base's decoding steps of `rows` rows with `held` tokens each in the cache."""
        keys = torch.zeros(rows, self.kv_heads, held, self.head_dim, device=self.device, dtype=self.dtype)

        def step() -> None:
            cache = DynamicCache()
            for layer in range(LAYERS):
                cache.update(keys, keys, layer)
            self._run(rows, 1, cache)

        with torch.no_grad(), self.decoder.disable_adapter():
            return self._timed(step) / LAYERS

    def saved_bytes(self, tokens: int) -> float:
        """Bytes a token that a layer keeps for its backward pass, counted on the tensors that autograd saves."""
        weights = {t.untyped_storage().data_ptr() for t in (*self.decoder.parameters(), *self.decoder.buffers())}
        held: dict[int, int] = {}
        kept: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)  # alive until all are counted: an address must not be used twice
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            self._run(1, tokens, leaf=True)
        return sum(held.values()) / tokens / LAYERS

    def _run(self, rows: int, tokens: int, cache: DynamicCache | None = None, leaf: bool = False) -> Tensor:
        x = torch.randn(rows, tokens, self.hidden, device=self.device, dtype=self.dtype, requires_grad=leaf)
        held = 0 if cache is None else cache.get_seq_length()
        seen = torch.ones(rows, 1, tokens, held + tokens, dtype=torch.bool, device=self.device).tril(held)
        mask = {"full_attention": seen, "sliding_attention": seen} if self.masks_by_kind else seen
        positions = torch.arange(held, held + tokens, device=self.device).expand(rows, -1)
        out: Tensor = self.decoder(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return out

    def _timed(self, run: Callable[[], object]) -> float:
        """The median of a few runs after a first that warms up."""
        times: list[float] = []
        for _ in range(12):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - start)
            if sum(times[1:]) > SECONDS:
                break
        return statistics.median(times[1:] or times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
