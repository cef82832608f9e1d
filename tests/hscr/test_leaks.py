"""The leak check: what counts as the same picture, what does not, and that an evaluation on it is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from hscr.data_set import DataSet
from hscr.demo import data
from hscr.events import Warning_
from hscr.leaks import Leak, check_evaluation, describe, find_leaks, prints, refuse_own_data
from hscr.run_dir import RunDir
from tests.hscr.tiny import picture, save_records


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Demo slices: heads of one shape, the hard case for a perceptual hash. One template only: each takes seconds to read."""
    return data.build(tmp_path_factory.mktemp("demo"), 0, sizes={"align": 60, "valid": 60})


def images(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue()))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda i: i,
    "re-encoded": lambda i: jpeg(i, 50),
    "halved": lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS),
    "doubled": lambda i: i.resize((i.width * 2, i.height * 2), Image.Resampling.BICUBIC),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.1),
    "more contrast": lambda i: ImageEnhance.Contrast(i).enhance(1.1),
    "all at once": lambda i: ImageEnhance.Brightness(jpeg(i.resize((56, 56)), 75)).enhance(1.1),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_of_a_slice_are_found_and_other_slices_are_not(
    slices: dict[str, Path], tmp_path: Path, copy: str
) -> None:
    """Ten slices stand on the left, their copies on the right: exactly these ten pairs are found, and no other of 50 × 50."""
    originals = images(slices["valid"])[50:]
    copies = []
    for n, original in enumerate(originals):
        copies.append(tmp_path / f"{n}.png")
        COPIES[copy](Image.open(original)).save(copies[-1])
    found = find_leaks(images(slices["align"])[:40] + originals, images(slices["valid"])[:40] + copies)
    assert sorted((leak.first, leak.second) for leak in found) == [(41 + n, 41 + n) for n in range(10)]
    assert all(leak.same for leak in found) == (copy == "as it is")


def test_the_demo_splits_pass(slices: dict[str, Path]) -> None:
    assert find_leaks(images(slices["align"]), images(slices["valid"])) == []


def test_the_same_pixels_in_another_file_format_are_the_same(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "a.webp", lossless=True)
    picture(1).save(tmp_path / "b.png")
    files = [tmp_path / "b.png", tmp_path / "a.png"]
    assert find_leaks(files, [tmp_path / "a.webp"]) == [Leak(2, 1, True, 0)]


def test_distances_are_counted_over_all_bits_and_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's own count on unpacked bits, one row a block."""
    for n in range(6):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (8, 8), dtype=np.uint8)).resize((64, 64)).save(
            tmp_path / f"{n}.png"
        )
    found = prints(sorted(tmp_path.iterdir()))
    bits = np.unpackbits(found.hashes.view(np.uint8), axis=1)
    expected = {(i, j): int((bits[i] != bits[j]).sum()) for i in range(6) for j in range(6)}
    assert max(expected.values()) > 64
    monkeypatch.setattr("hscr.leaks.NEAR_BITS", 256)
    monkeypatch.setattr("hscr.leaks._CHUNK", 1)
    from hscr.leaks import near

    assert {(i, j): d for i, j, _, d in near(found, found)} == expected


def test_an_evaluation_on_the_same_pictures_is_refused_by_number_and_allowed_with_a_warning(tmp_path: Path) -> None:
    train, other = save_records(tmp_path / "a", 8), save_records(tmp_path / "b", 4)
    for n in (0, 1):
        picture(100 + n).save(other / "images" / f"{n}.png")  # records 3 and 4 stay as they are in the other folder
    run = RunDir(tmp_path / "run")
    pair = DataSet(train), DataSet(other)
    with pytest.raises(
        ValueError, match=r"2 of 4 evaluation records.*2 the same, 0 nearly.*: 3 and 3, 4 and 4"
    ) as refused:
        list(check_evaluation(run, *pair, allow=False))
    assert "--allow-leak" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in (".png", "r2", "lesion"))
    assert len(json.loads((run.path / "leaks.json").read_text())) == 2
    events = list(check_evaluation(run, *pair, allow=True))
    assert [type(e) for e in events] == [Warning_]
    for n in range(4):
        picture(100 + n).save(other / "images" / f"{n}.png")
    assert list(check_evaluation(run, DataSet(train), DataSet(other), allow=False)) == []


def test_many_pairs_are_told_briefly() -> None:
    leaks = [Leak(n, n, n < 3, 0) for n in range(1, 6)]
    assert describe(leaks, 9) == (
        "5 of 9 evaluation records have a picture that is also in the data to align on (2 the same, 3 nearly); "
        "pairs of record numbers: 1 and 1, 2 and 2, 3 and 3 …."
    )


def test_an_adapter_that_names_the_data_set_is_not_evaluated_on_it(tmp_path: Path) -> None:
    digest = DataSet(save_records(tmp_path / "a", 2)).digest
    (tmp_path / "hscr.json").write_text(json.dumps({"lineage": {"data": digest}}))
    with pytest.raises(ValueError, match="aligned on this very data set"):
        refuse_own_data(tmp_path, digest)
    refuse_own_data(tmp_path, "sha256:other")
    (tmp_path / "hscr.json").unlink()
    refuse_own_data(tmp_path, digest)
    shutil.rmtree(tmp_path / "a")


def test_a_leak_through_a_further_image_is_told_by_its_record(tmp_path: Path) -> None:
    """Two records of two pictures each on either side; only the second pictures of 1 (left) and 2 (right) are the same."""
    sides = []
    for name, seeds in (("a", [(0, 1), (2, 3)]), ("b", [(10, 11), (12, 1)])):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        rows = []
        for n, pair in enumerate(seeds):
            for seed in pair:
                picture(seed).save(folder / "images" / f"{seed}.png")
            row = {"id": f"r{n}", "images": [f"images/{s}.png" for s in pair], "question": "Where?", "answer": "left"}
            rows.append(json.dumps(row) + "\n")
        (folder / "records.jsonl").write_text("".join(rows))
        sides.append(DataSet(folder))
    with pytest.raises(ValueError, match=r"1 of 2 evaluation records.*pairs of record numbers: 1 and 2\."):
        list(check_evaluation(RunDir(tmp_path / "run"), *sides, allow=False))
