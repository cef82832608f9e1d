"""The reproduction: its plan as data, its measures on known answers, and a run in miniature that resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hscr.records import GroundedWord, VQARecord
from hscr.reproduction.measures import answer_scores, crossed_interval
from hscr.reproduction.plan import (
    ANCHORED,
    FULL,
    GRID_SEED,
    OBJECTIVES,
    QUICK,
    Arm,
    Cell,
    Scale,
    generations,
    grid_cells,
    needs,
    table_cells,
)
from hscr.reproduction.run import chosen_rates, reproduce

SFT, SELECTED, DPO, BOTH = OBJECTIVES[0], OBJECTIVES[1], OBJECTIVES[2], OBJECTIVES[-1]


def _cell(arm=BOTH, seed=0, lr=1e-3, n=10):
    return Cell("habit", arm, seed, lr, n, {"valid": 2})


class TestPlan:
    @pytest.mark.parametrize("scale", [FULL, QUICK], ids=["full", "quick"])
    def test_every_arm_is_a_valid_configuration_and_finds_its_rate(self, scale):
        grid = grid_cells(scale)
        rates = {(c.base, c.arm.name): c.lr for c in grid}
        cells = table_cells(scale, rates)
        assert len(cells) == len(scale.seeds) * sum(len(arms) for arms in scale.arms.values())
        assert all(c.config.optimization.lr == c.lr and c.config.seed == c.seed for c in cells)

    def test_the_full_form_holds_what_the_paper_compares(self):
        arms = {a.name: a for a in FULL.arms["habit"]}
        settings = [Cell("habit", a, 0, 1e-3, 1, {}).config for a in arms.values()]
        assert {s.optimization.objective for s in settings} == {
            "sft", "dpo", "listwise", "lipo", "explicit", "implicit", "hscr",
        }  # fmt: skip
        assert {s.preference.perturbation for s in settings} == {"token_dropout", "latent_mask", "patch_mask", "pixel_mask"}  # fmt: skip
        assert {s.preference.dropout_ratio for s in settings} == {0.3, 0.5, 0.7, 0.9}
        assert {s.preference.continuation for s in settings} == {"splice", "redecode"}
        assert {a.entries for a in arms.values()} == {None, 250, 1000, 2000}
        assert len(FULL.seeds) >= 5

    def test_learning_rates_never_come_from_the_test_part_nor_from_a_seed_of_the_table(self):
        for scale in (FULL, QUICK):
            assert {split for c in grid_cells(scale) for split in c.asked} == {"valid"}
            assert GRID_SEED not in scale.seeds
            assert len({tuple(c.lr for c in grid_cells(scale) if c.arm is a) for a in OBJECTIVES[:1]}) == 1

    def test_an_arm_takes_the_rate_of_the_arm_it_varies(self):
        varied = Arm("other data", {"dropout_ratio": 0.3}, {"objective": "hscr"}, lr_of=BOTH.name)
        scale = Scale((0,), 10, 2, 2, (1e-3,), {"habit": (BOTH, varied)})
        assert [c.arm for c in grid_cells(scale)] == [BOTH]
        assert [c.lr for c in table_cells(scale, {("habit", BOTH.name): 7e-3})] == [7e-3, 7e-3]

    def test_preferences_are_shared_at_the_largest_number_and_supervision_needs_none(self):
        small, large, sft, selected = _cell(n=10), _cell(DPO, n=40), _cell(SFT), _cell(SELECTED, n=15)
        reads = generations([small, large, sft])
        assert reads[small] is reads[large]
        assert reads[large].n == 40
        assert sft not in reads
        assert needs(selected) == 30
        assert generations([_cell(seed=1), small])[small].seed == 0

    def test_a_name_is_no_setting_but_selection_is(self):
        lineage = {"model": "m"}
        other = Arm("another name", optimization=SFT.optimization)
        assert _cell(SFT).key(lineage) == _cell(other).key(lineage)
        assert _cell(SFT).key(lineage) != _cell(SELECTED).key(lineage)
        assert _cell(SFT).key(lineage) != _cell(SFT).key({"model": "n"})
        assert _cell(SFT).key(lineage) != _cell(SFT, lr=2e-3).key(lineage)


class TestMeasures:
    records = (
        VQARecord("a", "a.png", "Side?", "On the right.", grounded=(GroundedWord("right", ("left", "right")),)),
        VQARecord("b", "b.png", "Side?", "On the left.", grounded=(GroundedWord("left", ("left", "right")),)),
        VQARecord("c", "c.png", "Left?", "no", answer_type="closed", options=("yes", "no")),
    )

    def test_grounded_closed_and_the_prior_where_it_is_wrong(self):
        values = answer_scores(self.records, ["On the left.", "On the left.", "no"])
        assert np.array_equal(values["grounded"], [0, 1, np.nan], equal_nan=True)
        assert np.array_equal(values["closed"], [np.nan, np.nan, 1], equal_nan=True)
        assert np.array_equal(values["right"], [0, 1, 1])
        # "left" is the usual word: said where "right" is true; where it is true it is no prior that is wrong.
        assert np.array_equal(values["prior"], [1, np.nan, np.nan], equal_nan=True)

    def test_the_interval_is_over_seeds_and_items(self):
        """Equal items and differing seeds: only the resampling of seeds opens the interval; and the other way round."""
        over_seeds = crossed_interval(np.repeat([[0.0], [1.0], [0.5], [0.2], [0.8]], 50, axis=1))
        over_items = crossed_interval(np.repeat([[0.0, 1.0] * 25], 5, axis=0))
        assert over_seeds["high"] - over_seeds["low"] > 0.4
        assert over_items["high"] - over_items["low"] == pytest.approx(2 * 1.96 * 0.5 / 50**0.5, rel=0.15)
        assert crossed_interval(np.array([[1.0, np.nan], [3.0, np.nan]]))["mean"] == 2


class TestRates:
    records = TestMeasures.records

    def _tried(self, *results):
        return [
            (_cell(lr=lr), {"valid": {"answers": a}} if isinstance(a, list) else {"diverged": a}) for lr, a in results
        ]

    def test_most_right_answers_win_and_of_equals_the_smaller_rate(self):
        good, bad = ["right", "left", "no"], ["left", "left", "no"]
        tried = self._tried((1e-3, bad), (2e-3, good), (4e-3, good), (8e-3, "loss is nan"))
        assert chosen_rates(tried, self.records) == {("habit", BOTH.name): 2e-3}

    def test_an_arm_that_diverges_at_every_rate_is_said(self):
        with pytest.raises(ValueError, match=r"every one diverged for both \(HSCR\)"):
            chosen_rates(self._tried((1e-3, "loss is nan")), self.records)


@pytest.mark.thorough
def test_a_run_in_miniature_resumes_and_its_tables_stand_on_what_was_said(tmp_path):
    arms = (SFT, SELECTED, BOTH, ANCHORED[2])
    scale = Scale((0, 1), 16, 8, 12, (1e-3, 5e-3), {"habit": arms, "well_trained": (SFT, BOTH)})
    seen = []
    summary = reproduce(tmp_path, scale, 1, lambda phase, done, total: seen.append((phase, done, total)))
    assert [r["arm"] for r in summary["rows"]["habit"]] == ["base", *(a.name for a in arms)]
    assert {g["lr"] for g in summary["grid"]["habit"]} == {1e-3, 5e-3}
    text = (tmp_path / "reproduction.md").read_text()
    assert "both + NLL − further SFT" in text
    assert "<svg" in (tmp_path / "reproduction.html").read_text()
    # The table again from the stored answers of one cell, counted by hand.
    row = next(r for r in summary["rows"]["habit"] if r["arm"] == BOTH.name)
    cells = [json.loads(p.read_text()) for p in (tmp_path / "cells").iterdir()]
    said = [c for c in cells if c["arm"] == BOTH.name and c["base"] == "habit" and "test" in c]
    assert len(said) == 2
    assert all(len(c["test"]["answers"]) == 12 for c in said)
    assert all(len(c["test"][name]) == 6 for c in said for name in ("shuffled", "logp", "grounding"))
    assert row["level"]["logp"] == pytest.approx(np.mean([c["test"]["logp"] for c in said]), abs=1e-6)
    # One cell lost: only that one is run again, and it comes out the same.
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    lost = next(p for p in files if json.loads(p.read_text()).get("arm") == ANCHORED[2].name)
    lost.unlink()
    again = reproduce(tmp_path, scale, 1, lambda *_: None)
    assert [p for p, t in files.items() if p.stat().st_mtime_ns != t] == [lost]
    for base in scale.arms:
        assert [r.get("gain") for r in again["rows"][base]] == [r.get("gain") for r in summary["rows"][base]]


_POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from hscr.reproduction.run import _start
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 120).result()
"""


@pytest.mark.thorough
def test_a_killed_reproduction_leaves_no_pool_at_work(tmp_path):
    """The pool is in the middle of a cell: without a thread that follows the parent it would finish it, and those that wait."""
    script = tmp_path / "pool.py"
    script.write_text(_POOL)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the pool's process outlived its parent by ten seconds")
