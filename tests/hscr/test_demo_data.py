"""The demo data: deterministic, whole, balanced where it says so, and true to the labels."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hscr.demo.baselines import baselines
from hscr.demo.data import BALANCED, HOSPITAL_HABITS, KIND_WEIGHTS, SPLITS, build, sample
from hscr.demo.language import KINDS, PARTS, REGIONS, ask, kinds_for
from hscr.demo.slices import SIZE, Facts, LesionWish, MarkerWish, render
from hscr.demo.volumes import LICENCES, PLANES, STRUCTURES, load_template
from hscr.records import read_records
from hscr.splits import split_data

SMALL = {"align": 12, "test": 10}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    build(out, seed=3, sizes=SMALL)
    return out


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", seed=3, sizes=SMALL)
    assert _bytes(tmp_path / "again") == _bytes(built)
    build(tmp_path / "other", seed=4, sizes=SMALL)
    assert _bytes(tmp_path / "other") != _bytes(built)


def test_a_whole_folder_is_left_as_it_is_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    seen: list[str] = []
    folders = build(tmp_path, seed=3, sizes={"align": 4})
    build(tmp_path, seed=3, sizes={"align": 4}, progress=lambda split, done, total: seen.append(split))
    assert set(seen) == {"cached"}
    good = _bytes(tmp_path)
    (folders["align"] / "images/000002.png").write_bytes(b"torn")
    seen.clear()
    build(tmp_path, seed=3, sizes={"align": 4}, progress=lambda split, done, total: seen.append(split))
    assert set(seen) == {"align"}
    assert _bytes(tmp_path) == good


def test_records_are_valid_and_images_are_square_grey_png(built: Path) -> None:
    for name, size in SMALL.items():
        records, rejected = read_records(built / name)
        assert not rejected
        assert len(records) == size
        for record in records:
            with Image.open(built / name / record.image) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "L", (SIZE, SIZE))
            assert record.grounded
            assert (record.meta["volume"], record.group) == (SPLITS[name].template, None)
            assert record.meta["kind"] in KIND_WEIGHTS
            if record.answer_type == "closed":
                assert record.answer in record.options


def test_demo_records_are_split_one_by_one(built: Path, tmp_path: Path) -> None:
    """`group` is a patient or study. A kind of question in its place held whole kinds together: few units, and parts that stay empty."""
    summary = split_data(built / "align", tmp_path / "parts", {"train": 0.5, "test": 0.5}, seed=0)
    assert sum(part["groups"] for part in summary["parts"].values()) == SMALL["align"]


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown splits"):
        build(tmp_path, sizes={"train": 1})


def test_splits_are_disjoint_by_number_and_test_has_its_own_template() -> None:
    assert len({split.number for split in SPLITS.values()}) == len(SPLITS)
    assert {name for name, split in SPLITS.items() if split.template == "09c"} == {"test"}


def test_an_alternative_never_occurs_elsewhere_in_an_answer() -> None:
    """Exactly one word of each grounded category stands in the answer, and it is the true one."""
    rng = np.random.default_rng(0)
    every = frozenset(PARTS)
    for index in range(3000):
        lesion = LesionWish(
            *(str(rng.choice(c)) for c in (("left", "right"), REGIONS, ("small", "large"), ("bright", "dark")))
        )
        marker = MarkerWish(str(rng.choice(("left", "right"))), str(rng.choice(PARTS)))
        facts = Facts(PLANES[index % 2], every - {"putamen"}, frozenset({"putamen"}), lesion, marker)
        asked = ask(rng, facts, str(rng.choice(kinds_for(facts))))
        words = re.findall(r"[a-z]+", asked.answer.lower())
        for word, among in asked.grounded:
            assert [w for w in words if w in among] == [word], asked
        if asked.answer_type == "closed":
            assert asked.answer in asked.options
        assert "{" not in asked.question + asked.answer


def test_every_kind_has_a_weight_and_sagittal_slices_are_never_asked_for_a_side() -> None:
    assert set(KIND_WEIGHTS) == set(KINDS)
    facts = Facts(
        "sagittal", frozenset(PARTS), frozenset(), LesionWish("", "deep", "small", "dark"), MarkerWish("", "insula")
    )
    rng = np.random.default_rng(0)
    assert not {"side", "side_which", "side_yesno", "marker_side"} & set(kinds_for(facts))
    for kind in kinds_for(facts):
        assert not {"left", "right"} & {word for word, _ in ask(rng, facts, kind).grounded}


def test_lesion_and_marker_lie_where_the_facts_say() -> None:
    rng = np.random.default_rng(1)
    template = load_template("09c")
    for side, sign in (("left", -1), ("right", 1)):
        for size, look in (("small", "dark"), ("large", "bright")):
            wish, mark = LesionWish(side, "temporal", size, look), MarkerWish(side, "cerebellum")
            drawn = render(rng, template, "coronal", wish, mark)
            assert drawn is not None
            assert drawn.lesion_centre
            assert drawn.marker_centre
            body = drawn.lesion_mask > 0.5
            assert (np.sign(drawn.x_mm[body]) == sign).mean() > 0.95
            assert (120 < body.sum() < 400) if size == "large" else (12 < body.sum() < 60)
            level = drawn.image[body].mean() / 255
            assert level > 0.75 if look == "bright" else level < 0.35
            assert STRUCTURES[drawn.structure[drawn.marker_centre]] == "cerebellum"
            assert np.sign(drawn.x_mm[drawn.marker_centre]) == sign


def test_left_of_the_patient_is_left_in_the_image() -> None:
    """Neurological convention: in axial and coronal slices x grows from the image's left to its right."""
    rng = np.random.default_rng(2)
    for plane in ("axial", "coronal"):
        drawn = render(rng, load_template("09a"), plane)
        assert drawn is not None
        assert drawn.x_mm[:, :10].mean() < -50
        assert drawn.x_mm[:, -10:].mean() > 50


def test_habits_tilt_the_words_and_balance_does_not() -> None:
    def share(habits: object) -> tuple[float, float]:
        words: Counter[str] = Counter()
        for index in range(150):
            _, asked = sample(np.random.default_rng([9, index]), load_template("09a"), habits, "where")  # type: ignore[arg-type]
            words.update(word for word, _ in asked.grounded)
        return words["left"] / (words["left"] + words["right"]), words["frontal"] / 150

    left, frontal = share(BALANCED)
    assert 0.36 < left < 0.64
    assert frontal < 0.25
    left, frontal = share(HOSPITAL_HABITS)
    assert left > 0.62
    assert frontal > 0.48


@pytest.mark.thorough
def test_answers_cannot_be_guessed_without_the_image(tmp_path: Path) -> None:
    """Fitted on a biased split, the best guess from the question alone stays near chance on balanced questions."""
    folders = build(tmp_path, seed=0, sizes={"pretrain": 500, "test": 300})
    no_image = baselines(folders["test"], folders["pretrain"])["no_image"]
    for name in ("all open", "all closed"):
        assert no_image[name]["accuracy"] < no_image[name]["chance"] + 0.12


def test_only_volumes_whose_licence_allows_it_are_used() -> None:
    used = {licence.volume for licence in LICENCES if licence.used}
    assert used == {"ICBM 152 2009a symmetric T1, GM, WM", "ICBM 152 2009c asymmetric brain", "AAL2 labels"}
