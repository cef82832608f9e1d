"""Layers of a vision tower that nobody reads: LLaVA takes its features from the last but one, and the stock tower computes them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def unread_layers(model: Any) -> Sequence[Any]:
    """The layers of a CLIP tower behind the last one whose states become features; none where the family's towers are read otherwise."""
    chosen = getattr(model.config, "vision_feature_layer", None)
    layers = [m for n, m in model.named_modules() if "vision_tower" in n and type(m).__name__ == "CLIPEncoderLayer"]
    if chosen is None or not layers:
        return []
    # States are numbered from what enters the first layer; layer k makes state k + 1.
    last = max(at % (len(layers) + 1) for at in ([chosen] if isinstance(chosen, int) else chosen))
    return layers[last:]


@contextmanager
def unread_layers_passed_by(model: Any) -> Iterator[None]:
    """Within, these layers hand on what they are given: features stay the same, bit for bit."""
    layers = unread_layers(model)
    for layer in layers:
        layer.forward = _handed_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _handed_on(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return states
