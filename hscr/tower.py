"""What of a vision tower nobody reads: LLaVA takes the features of the layer before the last, and stock towers compute the last one too.

A layer that is passed over keeps its place, so that layers are counted as ever, and its weights, so that what is saved is whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def pass_over_unread_layers(model: Any) -> int:
    """Let layers behind the last that `vision_feature_layer` names hand on what they get; how many. Features stay the same, bit by bit."""
    chosen = getattr(model.config, "vision_feature_layer", None)
    tower = next((m for n, m in model.named_modules() if n.split(".")[-1] == "vision_tower"), None)
    if chosen is None or tower is None:
        return 0
    stacks = [m for n, m in tower.named_modules() if n.endswith("encoder.layers") and isinstance(m, nn.ModuleList)]
    if len(stacks) != 1:
        return 0
    (layers,) = stacks
    # Of L layers there are L + 1 hidden states, the first before any layer.
    read = max(at % (len(layers) + 1) for at in ([chosen] if isinstance(chosen, int) else chosen))
    for layer in layers[read:]:
        layer.forward = _handed_on  # on this layer alone: its class stays, by which transformers finds hidden states
    return len(layers) - read


def _handed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
