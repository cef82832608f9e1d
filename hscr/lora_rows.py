"""LoRA adapters side by side: every row of a batch goes through its own adapter, or through none, in one forward pass.

h = W x + s·B A x (Hu et al. 2021, arXiv 2106.09685), s = alpha / r, or alpha / √r under rsLoRA. Of all adapters in a batch A and B are laid
side by side, and of A x each row keeps its own adapter's ranks, so any mix costs two products a layer. Hooks stand on the changed layers
while an adapter is loaded and do nothing outside `rows`, which ends with the block it guards, whatever is raised there: nothing of an
adapter can stay behind on the base. Numbers are peft's: float32 adapters, the sum in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hscr.parent import WEIGHTS, read_adapter

Pair = tuple[Tensor, Tensor]  # A [r, in], s·B [out, r]
Ranks = tuple[tuple[str, int], ...]  # who has how many of the ranks that lie side by side, in order
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass
class _Side:
    """Of some adapters each layer's A [R, in] and s·B [out, R] side by side, and the same of layers that are one product (`joint`)."""

    adapters: frozenset[str]
    layers: dict[str, tuple[Tensor, Tensor, Ranks]]
    joints: dict[tuple[str, ...], tuple[Tensor, Tensor, Ranks] | None] = field(default_factory=dict)


@dataclass
class _Plan:
    """Which adapter each row has, and what the layers need for it: masks [n, 1, R] by the order and ranks of a layer's adapters."""

    names: tuple[str | None, ...]
    side: _Side
    masks: dict[Ranks, Tensor | None] = field(default_factory=dict)

    def mask(self, ranks: Ranks, device: torch.device) -> Tensor | None:
        if ranks not in self.masks:
            self.masks[ranks] = _mask(self.names, ranks, device)
        return self.masks[ranks]


class LoraRows:
    """The adapters loaded on one model, by name. Not thread-safe."""

    def __init__(self, base: torch.nn.Module, device: torch.device) -> None:
        self.base, self.device = base, device
        self._adapters: dict[str, dict[str, Pair]] = {}
        self._hooks: dict[str, Any] = {}
        self._plan: _Plan | None = None
        self._last: _Plan | None = None  # rows seldom change from one step to the next
        self._side: _Side | None = None

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
        if self._side is not None and name in self._side.adapters:
            self._side = self._last = None
        for module in [m for m in self._hooks if not any(m in pairs for pairs in self._adapters.values())]:
            self._hooks.pop(module).remove()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Forward passes within have these adapters, one a row, None for the base. Raises ValueError for a name that is not loaded."""
        wanted = {n for n in names if n is not None}
        if not wanted <= self._adapters.keys():
            raise ValueError("no adapter of that name is loaded")
        self._plan = self._planned(tuple(names), wanted) if wanted else None
        try:
            yield
        finally:
            self._plan = None

    def only_changes(self, modules: Set[str]) -> bool:
        """Whether the adapters of the rows at hand leave all other layers alone."""
        return self._plan is None or self._plan.side.layers.keys() <= modules

    def joint(self, modules: tuple[str, ...], outs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """For layers with one input, laid one after the other: A [R, in], s·Bᵀ [R, sum of outs], mask [n, 1, R] of the rows at hand.

        None where no row's adapter changes any of them. R are the ranks of all adapters and layers, s·B is zero off its own layer.
        """
        found = self.laid(modules, outs)
        return (*found[:2], self.mask(found[2], found[0].device)) if found is not None else None

    @property
    def side(self) -> object | None:
        """What stands for the adapters that lie side by side for the rows at hand: another object, other tensors. None: the base alone."""
        return None if self._plan is None else self._plan.side

    @property
    def held(self) -> object | None:
        """What `side` was when rows last had adapters, as long as all of them are loaded."""
        return self._side

    def mask(self, ranks: Ranks, device: torch.device) -> Tensor | None:
        """Ones [n, 1, R] where each of the rows at hand has its own adapter's ranks; None where that is everywhere."""
        assert self._plan is not None
        return self._plan.mask(ranks, device)

    def laid(self, modules: tuple[str, ...], outs: Sequence[int]) -> tuple[Tensor, Tensor, Ranks] | None:
        """`joint`, in the mask's place whose ranks they are."""
        plan = self._plan
        if plan is None:
            return None
        if modules not in plan.side.joints:
            plan.side.joints[modules] = _jointly([plan.side.layers.get(m) for m in modules], outs)
        return plan.side.joints[modules]

    def _planned(self, names: tuple[str | None, ...], wanted: set[str]) -> _Plan:
        side = self._beside(wanted)
        if self._last is None or self._last.names != names or self._last.side is not side:
            self._last = _Plan(names, side)
        return self._last

    def _beside(self, wanted: set[str]) -> _Side:
        """The wanted adapters side by side."""
        held = self._side
        if held is not None and wanted <= held.adapters and len(held.adapters) <= 2 * len(wanted):
            return held  # adapters that just left cost little, and come back
        side = {}
        for module in self._hooks:
            pairs = {n: self._adapters[n][module] for n in sorted(wanted) if module in self._adapters[n]}
            if pairs:
                downs, ups = zip(*pairs.values(), strict=True)
                ranks = tuple((n, len(a)) for n, (a, _) in pairs.items())
                both = (torch.cat(downs), torch.cat(ups, 1)) if len(pairs) > 1 else (downs[0], ups[0])
                side[module] = (*both, ranks)
        self._side = _Side(frozenset(wanted), side)
        return self._side

    def _hook(self, module: str) -> Callable[..., Tensor | None]:
        def add(layer: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
            plan = self._plan
            if plan is None or module not in plan.side.layers:
                return None
            down, up, ranks = plan.side.layers[module]
            hidden = torch.nn.functional.linear(args[0].to(down.dtype), down)
            mask = plan.mask(ranks, hidden.device)
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


def _jointly(layers: Sequence[tuple[Tensor, Tensor, Ranks] | None], outs: Sequence[int]) -> Any:
    """`LoraRows.joint` of the layers' own, without the mask."""
    changed = [layer for layer in layers if layer is not None]
    if not changed:
        return None
    downs = torch.cat([down for down, _, _ in changed])
    ups = downs.new_zeros(len(downs), sum(outs))
    rank = column = 0
    for layer, out in zip(layers, outs, strict=True):
        if layer is not None:
            ups[rank : rank + len(layer[0]), column : column + out] = layer[1].T
            rank += len(layer[0])
        column += out
    return downs, ups, tuple(pair for _, _, ranks in changed for pair in ranks)


def _mask(names: tuple[str | None, ...], ranks: Ranks, device: torch.device) -> Tensor | None:
    """Ones [n, 1, R] where a row's own adapter has its ranks; None where that is everywhere."""
    if {n for n, _ in ranks} == set(names) and len(set(names)) == 1:
        return None
    numbers: dict[str | None, int] = {n: i for i, (n, _) in enumerate(ranks)}
    own = torch.tensor([[numbers.get(name, -1)] for name in names])
    of = torch.tensor([numbers[n] for n, r in ranks for _ in range(r)])
    return (own == of).float()[:, None].to(device)
