"""What the reproduction compares: bases, arms, seeds and learning rates, as plain data. Paper §4 (comparison and ablations).

An arm is one way to train on the same entries. A cell is one arm at one seed on one base: what hscr/reproduction/cell.py runs. Every arm
with a loss of its own gets the same grid of learning rates on the validation part, drawn with a seed of its own; an arm that changes only
the preference data takes the rate of the arm it varies (`lr_of`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hscr.artifacts import json_digest
from hscr.config import AlignConfig

GRID_SEED = 1000  # entries and order of the grid's cells: none that the table uses
ANCHOR = {"anchor": 2.0}
BASES = {
    "habit": "under-uses its image: the demo base, tuned at the end on biased text without images",
    "well_trained": "the same model before that stage",
}
# Entries come from the distribution that the base was tuned on, prior included.
ENTRY_SPLITS = {"habit": "pretrain", "well_trained": "align_balanced"}


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train: what differs from the common setting."""

    name: str
    preference: dict[str, Any] = field(default_factory=dict)
    optimization: dict[str, Any] = field(default_factory=dict)
    entries: int | None = None  # None = the scale's
    selected: bool = False  # only entries that got a graded wrong answer, as many
    lr_of: str = ""  # the arm whose grid gives the learning rate; empty = its own


@dataclass(frozen=True, eq=False)
class Cell:
    """One training and evaluation. `asked`: how many questions of which splits; the grid's cells see the validation part only."""

    base: str
    arm: Arm
    seed: int
    lr: float
    n_entries: int
    asked: dict[str, int]

    @property
    def config(self) -> AlignConfig:
        """The configuration of the run; γ = 0.5 throughout, for 0.1 asks margins of ten nats of answers as short as these."""
        optimization = {"gamma": 0.5, "checkpoint_every": 1_000_000} | self.arm.optimization
        return AlignConfig.from_dict(
            {"preference": self.arm.preference, "optimization": optimization | {"lr": self.lr}, "seed": self.seed}
        )

    def key(self, lineage: dict[str, str]) -> str:
        """Its identity: the settings and what they are applied to."""
        cell = asdict(self) | {"config": self.config.to_dict(), **lineage}
        cell["arm"] = {"selected": self.arm.selected}  # a name is no setting
        return json_digest(cell).removeprefix("sha256:")[:24]


@dataclass(frozen=True)
class Generation:
    """Preference data that several cells share: the first `n` entries of one base and seed under one configuration."""

    base: str
    seed: int
    n: int
    config: AlignConfig

    def key(self, lineage: dict[str, str]) -> str:
        spec = {"base": self.base, "seed": self.seed, "n": self.n, "preference": asdict(self.config.preference)}
        return json_digest(spec | lineage).removeprefix("sha256:")[:24]


OBJECTIVES = (
    Arm("further SFT", optimization={"objective": "sft"}),
    Arm("further SFT, selected entries", optimization={"objective": "sft"}, selected=True),
    Arm("DPO", optimization={"objective": "dpo"}),
    Arm("list-wise (Plackett-Luce)", optimization={"objective": "listwise"}),
    Arm("LiPO-λ", optimization={"objective": "lipo"}),
    Arm("explicit", optimization={"objective": "explicit"}),
    Arm("implicit", optimization={"objective": "implicit"}),
    Arm("both (HSCR)", optimization={"objective": "hscr"}),
)
ANCHORED = (
    Arm("DPO + NLL", optimization={"objective": "dpo", **ANCHOR}),
    Arm("explicit + NLL", optimization={"objective": "explicit", **ANCHOR}),
    Arm("both + NLL", optimization={"objective": "hscr", **ANCHOR}),
    Arm("both + DPOP guard", optimization={"objective": "hscr", "guard": 5.0}),
    Arm("random pairs + NLL", {"candidates": "random"}, {"objective": "hscr", **ANCHOR}),
    Arm("own wrong answers + NLL", {"candidates": "sampled"}, {"objective": "hscr", **ANCHOR}),
)


def _data(name: str, **preference: Any) -> Arm:
    """Pure HSCR on other preference data: an anchor would hide what the data are worth."""
    return Arm(name, preference, {"objective": "hscr"}, lr_of="both (HSCR)")


def _anchored(name: str, preference: dict[str, Any] | None = None, *, lr_of: str = "", **optimization: Any) -> Arm:
    return Arm(name, preference or {}, {"objective": "hscr", **ANCHOR, **optimization}, lr_of=lr_of)


VARIANTS = (
    _data("latent mask", perturbation="latent_mask"),
    _data("patch mask", perturbation="patch_mask"),
    _data("pixel mask", perturbation="pixel_mask"),
    _data("ρ = 0.3", dropout_ratio=0.3),
    _data("ρ = 0.5", dropout_ratio=0.5),
    _data("ρ = 0.9", dropout_ratio=0.9),
    _data("redecode", continuation="redecode"),
    _data("reward JS", reward="js"),
    _data("top-3 candidates", top_candidates=3),
    _anchored("closed as open + NLL", {"closed": "replace"}, lr_of="both + NLL"),
    _anchored("no closed levels + NLL", {"closed": "skip"}, lr_of="both + NLL"),
    _anchored("γ = 0.1 + NLL", gamma=0.1),
    _anchored("length-normalised + NLL", length_normalized=True),
    _anchored("anchor 0.5", anchor=0.5),
)
ENTRIES = tuple(
    Arm(f"{arm.name}, {n} entries", arm.preference, arm.optimization, entries=n, lr_of=arm.name)
    for arm in (OBJECTIVES[0], ANCHORED[2])
    for n in (250, 1000, 2000)
)
WELL_TRAINED = tuple(
    arm
    for arm in (*OBJECTIVES, *ANCHORED)
    if arm.name not in ("LiPO-λ", "both + DPOP guard", "DPO + NLL", "explicit + NLL", "own wrong answers + NLL")
)


@dataclass(frozen=True)
class Scale:
    """How much of it: seeds, entries a cell, questions asked, the grid, and the arms of each base."""

    seeds: tuple[int, ...]
    entries: int
    valid: int
    test: int
    lrs: tuple[float, ...]
    arms: dict[str, tuple[Arm, ...]]

    @property
    def asked(self) -> dict[str, int]:
        return {"valid": self.valid, "test": self.test}


FULL = Scale(
    seeds=(0, 1, 2, 3, 4),
    entries=320,
    valid=150,
    test=400,
    lrs=(1e-3, 2.5e-3, 6e-3),
    arms={"habit": (*OBJECTIVES, *ANCHORED, *VARIANTS, *ENTRIES), "well_trained": WELL_TRAINED},
)
_FEW = ("further SFT", "DPO", "both (HSCR)", "both + NLL")
QUICK = Scale(
    seeds=(0, 1),
    entries=160,
    valid=100,
    test=200,
    lrs=(3e-3, 6e-3),
    arms={base: tuple(a for a in (*OBJECTIVES, *ANCHORED) if a.name in _FEW) for base in BASES},
)


def grid_cells(scale: Scale) -> list[Cell]:
    """Every arm with a loss of its own at every learning rate, asked on the validation part."""
    return [
        Cell(base, arm, GRID_SEED, lr, scale.entries, {"valid": scale.valid})
        for base, arms in scale.arms.items()
        for arm in arms
        if not arm.lr_of
        for lr in scale.lrs
    ]


def table_cells(scale: Scale, lrs: dict[tuple[str, str], float]) -> list[Cell]:
    """Every arm at every seed with the learning rate {(base, arm name): lr} that its grid chose, asked on the test part."""
    varied = [(base, arm) for base, arms in scale.arms.items() for arm in arms]
    varied.sort(key=lambda one: bool(one[1].lr_of))  # stable: the comparison itself is whole first, then what varies it
    return [
        Cell(base, arm, seed, lrs[base, arm.lr_of or arm.name], arm.entries or scale.entries, scale.asked)
        for base, arm in varied
        for seed in scale.seeds
    ]


def needs(cell: Cell) -> int:
    """Entries whose preferences a cell reads: none where it is told no wrong answers, twice as many where it selects."""
    if cell.arm.selected:
        return 2 * cell.n_entries
    return 0 if cell.config.optimization.objective == "sft" else cell.n_entries


def generations(cells: Iterable[Cell]) -> dict[Cell, Generation]:
    """The preference data that each cell reads: one a base, seed and configuration, at the largest number that any of them asks for."""
    largest: dict[tuple[str, int, str], Generation] = {}
    reading = [
        (cell, (cell.base, cell.seed, json_digest(asdict(cell.config.preference)))) for cell in cells if needs(cell)
    ]
    for cell, key in reading:
        if key not in largest or needs(cell) > largest[key].n:
            largest[key] = Generation(cell.base, cell.seed, needs(cell), cell.config)
    return {cell: largest[key] for cell, key in reading}
