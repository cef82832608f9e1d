"""`python -m hscr.base_shapes MODEL [REVISION]`: the linear layers that an adapter may change as JSON, {name: [out, in]}.

A process of its own, so that a service that needs them once never loads torch.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def built_on_meta(model: str, revision: str | None = None) -> Any:
    """The model from config.json alone, on no device: no weight is read. ValueError for an unknown model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError("no such model at hand") from error
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


def linear_shapes(model: str, revision: str | None = None) -> dict[str, tuple[int, int]]:
    """Names and shapes of linear layers, but not of those that make the visual features, which all policies share."""
    import torch

    from hscr.families import makes_features

    found = built_on_meta(model, revision).named_modules()
    shapes = {n: m.weight.shape for n, m in found if isinstance(m, torch.nn.Linear)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if not makes_features(name)}


if __name__ == "__main__":
    json.dump(linear_shapes(sys.argv[1], *sys.argv[2:3]), sys.stdout)
