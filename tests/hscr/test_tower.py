"""A vision tower's layers that nobody reads are passed over, and the features are the stock ones, bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hscr.model import load_model


@pytest.mark.parametrize(("chosen", "unread"), [(-1, 0), (-2, 1), (1, 1), ([-2, -3], 1)])
def test_features_do_not_meet_a_layer_behind_the_one_that_is_read(
    tiny_folder: Path, tmp_path: Path, chosen: int | list[int], unread: int
) -> None:
    """The unread layers' weights are not numbers: they would show. They are still there, for whoever saves the model."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_feature_layer"] = chosen
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    width = 1 if isinstance(chosen, int) else len(chosen)
    projector = "multi_modal_projector.linear_1.weight"
    name = next(n for n in weights if n.endswith(projector))
    weights[name] = weights[name].repeat(1, width).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    gone = {str(number) for number in range(2 - unread, 2)}
    for key in weights:
        if "vision" in key and ".layers." in key and key.split(".layers.")[1].split(".")[0] in gone:
            weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    vlm = load_model(folder, device="cpu")
    with torch.no_grad():
        features = vlm.base.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    assert torch.equal(features, expected)
    held = vlm.base.state_dict()
    assert sum(bool(t.isnan().all()) for t in held.values()) == sum(bool(t.isnan().all()) for t in weights.values())
