"""The configuration: defaults of the paper, overlays, and messages that name the field."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from hscr.config import PRESETS, AlignConfig, preset


def test_defaults_are_the_papers_values() -> None:
    c = AlignConfig()
    p, o = c.preference, c.optimization
    assert (p.dropout_ratio, p.beta, p.n_coupled, p.n_candidates, p.n_levels, p.similarity_gap) == (
        0.7,
        0.9,
        10,
        5,
        3,
        0.1,
    )
    assert (o.gamma, o.lora_rank, o.lr, o.weight_decay, o.epochs, o.batch_size, o.anchor) == (
        0.1,
        16,
        5e-7,
        0.0,
        2,
        16,
        0.0,
    )
    assert (p.alpha, p.candidates_from, p.max_similarity, p.n_masks, o.pair_reduction) == (
        0.1,
        "dropped",
        0.9,
        1,
        "sum",
    )


def test_a_configuration_survives_json() -> None:
    for name in PRESETS:
        config = preset(name)
        assert AlignConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_stored_before_a_field_existed_still_loads() -> None:
    """What an older run left: no perturbation, reward, candidates or guard. They get the values that run had: the defaults."""
    stored = AlignConfig().to_dict()
    for name in ("perturbation", "reward", "coupling", "candidates", "sample_temperature", "replacement_choice"):
        del stored["preference"][name]
    del stored["preference"]["top_candidates"], stored["optimization"]["guard"]
    assert AlignConfig.from_dict(stored) == AlignConfig()


def test_every_new_choice_is_off_by_default() -> None:
    p = AlignConfig().preference
    assert (p.perturbation, p.reward, p.coupling, p.candidates) == ("token_dropout", "signed", "reward", "replacement")
    assert (p.top_candidates, p.replacement_choice, AlignConfig().optimization.guard) == (0, "lowest_p_diff", 0.0)


def test_overlay_changes_only_what_it_names() -> None:
    base = AlignConfig.from_dict({"optimization": {"lr": 0.01}})
    both = AlignConfig.from_dict({"optimization": {"gamma": 1}, "seed": 3}, base)
    assert (both.optimization.lr, both.optimization.gamma, both.seed) == (0.01, 1.0, 3)
    assert isinstance(both.optimization.gamma, float)
    assert both.preference == AlignConfig().preference


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimization": {"lr": -1}}, r"optimization\.lr: must be in \(0, 1\], got -1"),
        ({"optimization": {"lr": 0}}, r"optimization\.lr: must be in \(0, 1\], got 0"),
        ({"optimization": {"lr": float("nan")}}, r"optimization\.lr: must be in \(0, 1\], got nan"),
        ({"optimization": {"gamma": 10**400}}, r"optimization\.gamma: must be in \(0, 100\], got inf"),
        ({"optimization": {"epochs": 1.5}}, r"optimization\.epochs: must be int, got float"),
        ({"optimization": {"epochs": True}}, r"optimization\.epochs: must be int, got bool"),
        ({"optimization": {"lr": "1e-4"}}, r"optimization\.lr: must be float, got str"),
        ({"optimization": {"objective": "ppo"}}, r"optimization\.objective: must be one of hscr"),
        ({"optimization": {"lora_targets": "("}}, r"optimization\.lora_targets: is no regular expression"),
        ({"optimization": {"length_normalized": 1}}, r"optimization\.length_normalized: must be bool, got int"),
        ({"preference": {"dropout_ratio": 1.0}}, r"preference\.dropout_ratio: must be in \[0, 0\.99\]"),
        ({"preference": {"rho": 0.7}}, r"preference\.rho: unknown field; known here: dropout_ratio"),
        ({"preference": {"similarity": "x" * 1001}}, r"preference\.similarity: longer than 1000"),
        (
            {"preference": {"perturbation": "blur"}},
            r"preference\.perturbation: must be one of token_dropout, latent_mask",
        ),
        ({"preference": {"reward": "kl"}}, r"preference\.reward: must be one of signed, abs, js"),
        ({"preference": {"candidates": "gpt"}}, r"preference\.candidates: must be one of replacement, sampled, both"),
        ({"preference": {"sample_temperature": 0}}, r"preference\.sample_temperature: must be in \(0, 100\], got 0"),
        ({"preference": {"replacement_choice": 1}}, r"preference\.replacement_choice: must be str, got int"),
        ({"preference": {"top_candidates": -1}}, r"preference\.top_candidates: must be in \[0, 1000\], got -1"),
        ({"preference": {"coupling": "all"}}, r"preference\.coupling: must be one of reward, random"),
        ({"optimization": {"guard": -1}}, r"optimization\.guard: must be in \[0, 1000\], got -1"),
        ({"preference": 3}, r"preference: must be an object, got int"),
        ({"sneed": 1}, r"sneed: unknown field"),
        ({"seed": -1}, r"seed: must be in \[0, "),
        ([], r"configuration: must be an object, got list"),
    ],
)
def test_errors_name_the_field(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig.from_dict(values)


def test_a_long_unknown_name_is_cut() -> None:
    with pytest.raises(ValueError, match="unknown field") as error:
        AlignConfig.from_dict({"x" * 10_000: 1})
    assert len(str(error.value)) < 300


def test_every_default_obeys_its_own_rule() -> None:
    for section in ("preference", "optimization", "evaluation"):
        values = dataclasses.asdict(getattr(AlignConfig(), section))
        assert AlignConfig.from_dict({section: values}) == AlignConfig()


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset: must be one of paper, recommended"):
        preset("best")


def test_recommended_preset_holds_the_right_answer_up_and_keeps_closed_answers_apart() -> None:
    c = preset("recommended")
    assert c.optimization.anchor > 0
    assert c.preference.closed == "opposite"
    assert preset("paper").optimization == AlignConfig().optimization


def test_configuration_records_and_images_load_no_torch() -> None:
    code = "import sys, hscr.config, hscr.records, hscr.images, hscr.artifacts, hscr.events, hscr.run_dir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
