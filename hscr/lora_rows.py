"""LoRA adapters side by side: every row of a batch goes through its own adapter, or through none, in one forward pass.

h = W x + s·B A x (Hu et al. 2021, arXiv 2106.09685), s = alpha / r, or alpha / √r under rsLoRA. Of all adapters in a batch A and B are laid
side by side, and of A x each row keeps its own adapter's ranks, so any mix costs two products a layer. Hooks stand on the changed layers
while an adapter is loaded and do nothing outside `rows`, which ends with the block it guards, whatever is raised there: nothing of an
adapter can stay behind on the base. Numbers are peft's: float32 adapters, the sum in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hscr.parent import WEIGHTS, read_adapter

Pair = tuple[Tensor, Tensor]  # A [r, in], s·B [out, r]
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass
class _Plan:
    """Which adapter each row has, and what the layers need for it: masks [n, 1, R] by the order and ranks of a layer's adapters."""

    names: tuple[str | None, ...]
    side: dict[str, tuple[Tensor, Tensor, tuple[tuple[str, int], ...]]]
    masks: dict[tuple[tuple[str, int], ...], Tensor | None] = field(default_factory=dict)


class LoraRows:
    """The adapters loaded on one model, by name. Not thread-safe."""

    def __init__(self, base: torch.nn.Module, device: torch.device) -> None:
        self.base, self.device = base, device
        self._adapters: dict[str, dict[str, Pair]] = {}
        self._hooks: dict[str, Any] = {}
        self._plan: _Plan | None = None
        self._side: tuple[frozenset[str], dict[str, tuple[Tensor, Tensor, tuple[tuple[str, int], ...]]]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def n_bytes(self, name: str) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self._adapters[name].values())

    def load(self, name: str, folder: Path) -> None:
        """Read a PEFT folder. Raises ValueError, and then nothing has changed."""
        pairs = self._read(folder)
        self._adapters[name] = pairs
        for module in pairs:
            if module not in self._hooks:
                layer = self.base.get_submodule(module)
                self._hooks[module] = layer.register_forward_hook(self._hook(module))

    def unload(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            return
        if self._side is not None and name in self._side[0]:
            self._side = None
        for module in [m for m in self._hooks if not any(m in pairs for pairs in self._adapters.values())]:
            self._hooks.pop(module).remove()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Forward passes within have these adapters, one a row, None for the base. Raises ValueError for a name that is not loaded."""
        wanted = {n for n in names if n is not None}
        if not wanted <= self._adapters.keys():
            raise ValueError("no adapter of that name is loaded")
        self._plan = _Plan(tuple(names), self._beside(wanted)) if wanted else None
        try:
            yield
        finally:
            self._plan = None

    def _beside(self, wanted: set[str]) -> dict[str, tuple[Tensor, Tensor, tuple[tuple[str, int], ...]]]:
        """Each layer's A [R, in] and s·B [out, R] of the wanted adapters side by side, and who has how many of the R ranks."""
        if self._side is not None and wanted <= self._side[0] and len(self._side[0]) <= 2 * len(wanted):
            return self._side[1]  # adapters that just left cost little, and come back
        side = {}
        for module in self._hooks:
            pairs = {n: self._adapters[n][module] for n in sorted(wanted) if module in self._adapters[n]}
            if pairs:
                downs, ups = zip(*pairs.values(), strict=True)
                ranks = tuple((n, len(a)) for n, (a, _) in pairs.items())
                both = (torch.cat(downs), torch.cat(ups, 1)) if len(pairs) > 1 else (downs[0], ups[0])
                side[module] = (*both, ranks)
        self._side = frozenset(wanted), side
        return side

    def _hook(self, module: str) -> Callable[..., Tensor | None]:
        def add(layer: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
            plan = self._plan
            if plan is None or module not in plan.side:
                return None
            down, up, ranks = plan.side[module]
            hidden = torch.nn.functional.linear(args[0].to(down.dtype), down)
            if ranks not in plan.masks:
                plan.masks[ranks] = _mask(plan.names, ranks, hidden.device)
            mask = plan.masks[ranks]
            hidden = hidden if mask is None else hidden * mask
            return (out + torch.nn.functional.linear(hidden, up)).to(out.dtype)

        return add

    def _read(self, folder: Path) -> dict[str, Pair]:
        config: Any = read_adapter(folder)
        if config.peft_type != "LORA" or config.bias != "none" or _more_than_lora(config):
            raise ValueError("the adapter is no plain LoRA (no bias, DoRA, whole modules or patterns of ranks)")
        tensors = load_file(folder / WEIGHTS)
        pairs = {}
        try:
            for name in [n for n in tensors if n.endswith(DOWN)]:
                module = name.removeprefix(PREFIX).removesuffix(DOWN)
                layer: Any = self.base.get_submodule(module)
                a, b = tensors.pop(name), tensors.pop(name.removesuffix(DOWN) + UP)
                scale = config.lora_alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
                if a.shape[1] != layer.in_features or b.shape != (layer.out_features, len(a)):
                    raise ValueError
                pairs[module] = a.float().to(self.device), (b.float() * scale).to(self.device)
        except (AttributeError, KeyError, ValueError):
            raise ValueError("the adapter does not fit this model") from None
        if tensors or not pairs:
            raise ValueError("the adapter does not fit this model")
        return pairs


def _more_than_lora(config: Any) -> bool:
    extra = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "fan_in_fan_out")
    return any(getattr(config, name, None) for name in (*extra, "lora_bias", "trainable_token_indices"))


def _mask(names: tuple[str | None, ...], ranks: tuple[tuple[str, int], ...], device: torch.device) -> Tensor | None:
    """Ones [n, 1, R] where a row's own adapter has its ranks; None where that is everywhere."""
    if len(ranks) == 1 and set(names) == {ranks[0][0]}:
        return None
    mask = torch.tensor([[float(own == n) for n, r in ranks for _ in range(r)] for own in names])
    return mask[:, None].to(device)
