"""Checkpoints of an optimisation: adapter, optimiser and the loop's state, whole or not there.

Tensors lie in safetensors, the rest in JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hscr.artifacts import verify_manifest, write_json, write_manifest


def save_checkpoint(
    checkpoints: Path, state: dict[str, Any], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> str:
    """Write checkpoints/step-N (N = state["step"]), then delete older ones; returns its digest."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary, final = checkpoints / f".step-{state['step']}.tmp", checkpoints / f"step-{state['step']}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, temporary / "adapter.safetensors")
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", state)
    digest = write_manifest(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for other in checkpoints.iterdir():
        if other != final:
            shutil.rmtree(other)
    return digest


def restore_checkpoint(
    checkpoints: Path, plan: list[list[int]], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the newest whole checkpoint of this plan into the weights and the optimiser; its state, empty where there is none."""
    found = sorted(checkpoints.glob("step-*"), key=lambda p: -int(p.name.removeprefix("step-")))
    for folder in found:
        try:
            verify_manifest(folder)
        except ValueError:
            continue  # damaged: an older one, or the start, gives the same weights later
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if state["plan"] != plan:
            continue
        weights, moments = load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
                optimizer.state[parameter] = {
                    key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return state
    return {}
