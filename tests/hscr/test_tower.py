"""Layers of the tower behind the features: not computed, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hscr.model import encode_prompts, load_model, processed
from hscr.tower import unread_layers
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import save_tiny


@pytest.mark.parametrize(("chosen", "unread"), [(-2, 1), (-1, 0), (-3, 2), (1, 1), ([-2, 1], 1), ([-3, -1], 0)])
def test_features_are_the_stock_towers_and_layers_behind_them_are_not_computed(
    vlm: Any, chosen: Any, unread: int
) -> None:
    vlm.base.config.vision_feature_layer = chosen
    layers = unread_layers(vlm.base)
    assert len(layers) == unread
    if isinstance(chosen, list):  # the projector is as wide as one layer
        return
    stock = vlm.base.get_image_features(processed(vlm, [picture(0)], "What?")["pixel_values"], return_dict=True)
    computed: list[int] = []
    for layer in vlm.base.model.vision_tower.encoder.layers:
        layer.mlp.register_forward_hook(lambda *_: computed.append(1))
    features = encode_prompts(vlm, [picture(0)], ["What?"])[0].features
    assert features is not None
    assert torch.equal(features, stock.pooler_output[0])
    assert len(computed) == 2 - unread
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_tower_that_is_read_to_the_end_is_left_alone(tmp_path: Path) -> None:
    assert not unread_layers(load_model(save_tiny("gemma3", tmp_path), device="cpu").base)
