"""The science's configuration: what is dropped, rewarded, ranked and optimised, with the paper's values.

Frozen dataclasses whose every field carries its symbol, range or choices, and the paper's value. They are stored with the job and
beside the weights. Deployment (addresses, paths, limits) is not here: that is service/settings.py. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints


def _number(default: float, low: float, high: float, doc: str, *, open_low: bool = False) -> Any:
    """A number in [low, high], or (low, high] where `open_low`."""
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low, "doc": doc})


def _choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
    return field(default=default, metadata={"choices": choices, "doc": doc})


PERTURBATIONS = ("token_dropout", "latent_mask", "patch_mask", "pixel_mask")
REWARDS = ("signed", "abs", "js")
OBJECTIVES = ("hscr", "explicit", "implicit", "dpo", "listwise", "lipo", "sft")


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference generation: paper §3.1 (reward, replacement) and §3.2 (re-ranking). D marks a choice the paper leaves open."""

    dropout_ratio: float = _number(
        0.7, 0.0, 0.99, "ρ, share of visual tokens removed, or of what `perturbation` hides (paper 0.7)"
    )
    perturbation: str = _choice(
        "token_dropout",
        PERTURBATIONS,
        "what makes i' of i: visual tokens removed, their features zeroed, or patches or pixels of the image blanked (paper's ablation)",
    )
    n_masks: int = _number(1, 1, 16, "D: masks averaged in log-probability")
    reward: str = _choice(
        "signed",
        REWARDS,
        "D: a token's reward: log-probability difference, its absolute value, or the Jensen–Shannon divergence of both distributions",
    )
    coupling: str = _choice(
        "reward", ("reward", "random"), "which words are replaced: those of largest reward (paper), or any (a control)"
    )
    beta: float = _number(0.9, 0.0, 100.0, "β of P_diff (paper 0.9)")
    n_coupled: int = _number(
        10, 1, 1000, "n, modality-coupled positions (paper 10; D: at most half of the eligible words)"
    )
    alpha: float = _number(0.1, 0.0, 1.0, "D: α, plausibility constraint p(v) ≥ α·max p", open_low=True)
    candidates_from: str = _choice(
        "dropped", ("dropped", "full"), "D: the distribution that the plausibility constraint reads"
    )
    top_candidates: int = _number(
        0, 0, 1000, "D: the K most plausible tokens are candidates in place of α's (0 = α decides)"
    )
    replacement_choice: str = _choice(
        "lowest_p_diff",
        ("lowest_p_diff", "most_plausible"),
        "which candidate: least tied to the image (paper), or D: what the model would say without the image",
    )
    candidates: str = _choice(
        "replacement",
        ("replacement", "sampled", "both", "random"),
        "source of wrong answers: token replacement (paper), D: the model's own samples, both in one pool, or random words (a control)",
    )
    sample_temperature: float = _number(
        1.0, 0.0, 100.0, "temperature of `sampled` answers, n_candidates a record", open_low=True
    )
    continuation: str = _choice("splice", ("splice", "redecode"), "D: what follows the last replaced word")
    n_candidates: int = _number(5, 1, 100, "k, candidates of rising error (paper 5)")
    n_levels: int = _number(3, 1, 20, "j, levels kept (paper 3)")
    similarity_gap: float = _number(0.1, 0.0, 1.0, "least difference of neighbouring levels' similarities (paper 0.1)")
    max_similarity: float = _number(
        0.9, -1.0, 1.0, "D: the first level's similarity to the right answer is at most this"
    )
    similarity: str = field(
        default="minilm",
        metadata={"doc": "D: minilm (offline), token_f1, or a sentence-transformers model's name or folder"},
    )
    closed: str = _choice(
        "opposite",
        ("opposite", "replace", "skip"),
        "D: levels of a closed question: the other options, token replacement as for open ones, or no levels",
    )
    max_new_tokens: int = _number(64, 1, 4096, "longest continuation under `redecode`, longest `sampled` answer")
    batch_size: int = _number(32, 1, 4096, "records worked on together; an interrupted run loses at most these")
    token_budget: int = _number(
        32768,
        1,
        2**24,
        "tokens of one forward pass or key-value cache, padding included: memory and speed, not results",
    )


@dataclass(frozen=True)
class OptimizationConfig:
    """Multi-level preference optimisation: paper §3.3 and its run (LoRA r = 16, lr 5e-7, 2 epochs, batch 16)."""

    objective: str = _choice(
        "hscr",
        OBJECTIVES,
        "L_E + L_I, one of its parts, or a baseline",
    )
    gamma: float = _number(0.1, 0.0, 100.0, "γ, reward scale (paper 0.1)", open_low=True)
    anchor: float = _number(0.0, 0.0, 100.0, "D: weight of the supervised term on y_w (RPO; 0 in the paper)")
    guard: float = _number(
        0.0, 0.0, 1000.0, "D: λ of DPOP's penalty where log π(y_w) falls below the reference's (0 in the paper)"
    )
    length_normalized: bool = field(
        default=False, metadata={"doc": "D: h(y) from mean instead of summed log-probabilities (SimPO's normalisation)"}
    )
    pair_reduction: str = _choice("sum", ("sum", "mean"), "D: over a record's pairs")
    lr: float = _number(5e-7, 0.0, 1.0, "peak learning rate of AdamW (paper 5e-7)", open_low=True)
    lr_schedule: str = _choice("cosine", ("constant", "linear", "cosine"), "D: decay to zero after warm-up")
    warmup_ratio: float = _number(0.03, 0.0, 1.0, "D: share of the steps")
    weight_decay: float = _number(0.0, 0.0, 10.0, "paper: none")
    max_grad_norm: float = _number(1.0, 0.0, 1e6, "D: gradient clipping", open_low=True)
    epochs: int = _number(2, 1, 1000, "paper 2")
    batch_size: int = _number(16, 1, 4096, "records a step (paper 16)")
    token_budget: int = _number(
        8192, 1, 2**24, "tokens of one forward pass, padding included; gradients accumulate to batch_size"
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"doc": "compute activations again in the backward pass: less memory, about a third more time"},
    )
    attention: str = _choice(
        "auto",
        ("auto", "sdpa", "flex"),
        "attention over answers: sdpa, or flex, which skips blocks that none sees (CUDA); auto times both at the run's start",
    )
    lora_rank: int = _number(16, 1, 1024, "r (paper 16)")
    lora_alpha: int = _number(32, 1, 4096, "D: LoRA scale α")
    lora_targets: str = field(
        default="",
        metadata={
            "regex": True,
            "doc": "D: regular expression of module names; empty = all linear layers of the language model",
        },
    )
    checkpoint_every: int = _number(10, 1, 1_000_000, "steps between checkpoints")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of base and adapter: the two scorers, with the real, a blank and a shuffled image."""

    max_new_tokens: int = _number(64, 1, 4096, "longest answer")
    batch_size: int = _number(32, 1, 4096, "questions decoded together")
    max_records: int = _number(1000, 0, 1_000_000, "evaluate at most this many records (0 = none: skip the stage)")
    n_bootstrap: int = _number(2000, 100, 100_000, "resamples of the paired bootstrap")
    counterfactual: bool = field(default=True, metadata={"doc": "also ask with a blank and with a shuffled image"})
    calibration_share: float = _number(
        0.3,
        0.0,
        0.9,
        "share of the records (by hash of group or id) that the grounding score's flag threshold comes from",
    )
    allow_leak: bool = field(
        default=False, metadata={"doc": "evaluate although pictures are in the data to align on too (hscr/leaks.py)"}
    )


@dataclass(frozen=True)
class AlignConfig:
    """One align run. preset("paper") has the paper's values, preset("recommended") what this project measured as best."""

    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = _number(0, 0, 2**31 - 1, "all random streams derive from it")

    @classmethod
    def from_dict(cls, values: dict[str, Any], base: AlignConfig | None = None) -> AlignConfig:
        """Overlay `values` on `base` (default: the paper's). Unknown names and values out of range raise ValueError naming the field."""
        return _overlay(base or cls(), values, "")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _overlay(current: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.') or 'configuration'}: must be an object, got {type(values).__name__}")
    hints = get_type_hints(type(current))
    fields = {f.name: f for f in dataclasses.fields(current)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{path}{str(name)[:80]}: unknown field; known here: {', '.join(fields)}")
        where = f"{path}{name}"
        if dataclasses.is_dataclass(hints[name]):
            changes[name] = _overlay(getattr(current, name), value, f"{where}.")
        else:
            changes[name] = _checked(hints[name], fields[name].metadata, value, where)
    return dataclasses.replace(current, **changes)


def _checked(kind: type, rule: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: must be {kind.__name__}, got {type(value).__name__}")
    if "choices" in rule and value not in rule["choices"]:
        raise ValueError(f"{where}: must be one of {', '.join(rule['choices'])}")
    if "low" in rule:
        above = value > rule["low"] if rule["open_low"] else value >= rule["low"]
        if not (above and value <= rule["high"]):  # also refuses NaN
            left = "(" if rule["open_low"] else "["
            raise ValueError(f"{where}: must be in {left}{rule['low']:g}, {rule['high']:g}], got {value:g}")
    if isinstance(value, str) and len(value) > 1000:
        raise ValueError(f"{where}: longer than 1000 characters")
    if isinstance(value, str) and rule.get("regex"):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{where}: is no regular expression: {error}") from error
    return value


# `recommended` is the paper's with what docs/experiments.md measured as better: the opposite option for closed questions, γ = 0.5 and a
# supervised anchor. Its learning rate is a careful one for models of billions of parameters, not measured here; `demo` differs in nothing
# but the rate that a model of 3.7 million parameters needs to move within 60 steps.
_RECOMMENDED: dict[str, Any] = {"gamma": 0.5, "anchor": 2.0, "lr": 2e-5}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"preference": {"closed": "replace"}},
    "recommended": {"preference": {"closed": "opposite"}, "optimization": _RECOMMENDED},
    "demo": {"preference": {"closed": "opposite"}, "optimization": {**_RECOMMENDED, "lr": 5e-3}},
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> AlignConfig:
    """The configuration of that name; ValueError where there is none."""
    if name not in _PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}")
    return AlignConfig.from_dict(_PRESETS[name])
