"""A job's preference records through the API: pages, exports sent while they are made, and jobs that have none yet."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from hscr.export import FORMATS, export_lines
from hscr.records import Level, PreferenceRecord, VQARecord, WordReward, read_preferences, write_jsonl
from service import preferences
from service.bundle import zipped
from service.routes.preferences import Form
from service.settings import Settings
from tests.conftest import png, record

pytestmark = pytest.mark.either_database


def preference(number: int, n_levels: int = 2) -> PreferenceRecord:
    row = record(number)
    levels = [Level(f"Wrong {number}.{n}.", 0.9 - n / 10, (("left", "right"),)) for n in range(n_levels)]
    words = (WordReward("left", 1.5, True), WordReward("lobe", 0.25, False))
    return PreferenceRecord(VQARecord(**row), tuple(levels), words, {"too_similar": number})


@pytest.fixture
def job(new_job: Callable[..., str], settings: Settings) -> str:
    """A job whose attempt has generated: three records, the last without a level. What a run writes is in test_real_run.py."""
    job_id = new_job()
    save(settings, job_id, 1, [preference(0), preference(1, 1), preference(2, 0)])
    return job_id


def save(settings: Settings, job_id: str, fence: int, records: list[PreferenceRecord]) -> Path:
    folder = settings.data_dir / "runs" / job_id / f"attempt-{fence}"
    folder.mkdir(parents=True)
    write_jsonl(folder / "preferences.jsonl", records)
    return folder / "preferences.jsonl"


def test_pages_have_levels_similarity_and_reward_in_the_data_sets_order(client: TestClient, job: str) -> None:
    page = client.get(f"/jobs/{job}/preferences", params={"limit": 2}).json()
    assert (page["has_more"], page["next"]) == (True, "2")
    assert page["data"][0] == {
        "number": 1,
        "record": record(0) | {"answer_type": "open"},
        "levels": [
            {"text": f"Wrong 0.{n}.", "similarity": s, "replaced": [["left", "right"]]}
            | {"source": "replacement", "rejected": False, "correction": None}
            for n, s in enumerate((0.9, 0.8))
        ],
        "words": [
            {"text": "left", "reward": 1.5, "coupled": True},
            {"text": "lobe", "reward": 0.25, "coupled": False},
        ],
        "dropped": {"too_similar": 0},
        "rejected": False,
        "reviewed_by": None,
    }
    rest = client.get(f"/jobs/{job}/preferences", params={"limit": 2, "after": page["next"]}).json()
    assert [(p["number"], p["record"]["id"], p["levels"]) for p in rest["data"]] == [(3, "r2", [])]
    assert (rest["has_more"], rest["next"]) == (False, None)


def test_the_newest_attempt_is_read_and_a_half_written_last_line_is_not(
    client: TestClient, job: str, settings: Settings
) -> None:
    path = save(settings, job, 10, [preference(7), preference(8)])  # 10 is newer than 9, and than 1
    save(settings, job, 9, [preference(6)])
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 5)
    assert [p["record"]["id"] for p in client.get(f"/jobs/{job}/preferences").json()["data"]] == ["r7"]


def test_an_attempt_that_gives_way_while_it_is_looked_at_is_no_lack_of_records(
    job: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker renames the copy and removes the old folder between the listing and the opening."""
    from service import run_folders

    listed = run_folders.attempts

    def then_replaced(place: Path) -> list[Path]:
        found = listed(place)
        if found == [place / "attempt-1"]:
            found[0].rename(place / "attempt-2")
        return found

    monkeypatch.setattr(run_folders, "attempts", then_replaced)
    with preferences.opened(settings.data_dir, job) as file:
        assert len(preferences.some(file, 0, 10)) == 3


def test_a_job_without_records_yet_an_unknown_job_and_an_unknown_format_are_told_apart(
    client: TestClient, new_job: Callable[..., str], settings: Settings
) -> None:
    waiting = new_job()
    (settings.data_dir / "runs" / waiting / "attempt-1").mkdir(parents=True)
    (settings.data_dir / "runs" / waiting / "attempt-1" / "preferences.partial.jsonl").write_text("{}\n")
    for path in ("preferences", "preferences/export?format=trl"):
        answer = client.get(f"/jobs/{waiting}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "preferences_not_found")
        assert answer.headers["content-type"] == "application/problem+json"
        assert client.get(f"/jobs/job_none/{path}").json()["code"] == "job_not_found"
    for query in ("", "?format=alpaca"):
        answer = client.get(f"/jobs/{waiting}/preferences/export{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert answer.json()["errors"][0]["field"] == "query.format"


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_what_the_command_line_writes_with_the_images_it_names(
    client: TestClient, job: str, settings: Settings, form: str
) -> None:
    source = settings.data_dir / "runs" / job / "attempt-1" / "preferences.jsonl"
    expected = "".join(export_lines(read_preferences(source), form))
    lines = client.get(f"/jobs/{job}/preferences/export", params={"format": form, "images": False})
    assert (lines.text, lines.headers["content-type"]) == (expected, "application/jsonl")
    answer = client.get(f"/jobs/{job}/preferences/export", params={"format": form})
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == f'attachment; filename="{job}-{form}.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.read("preferences.jsonl").decode() == expected
        numbers = (0, 1, 2) if form == "hscr" else (0, 1)  # r2 has no level, so only our own form has a row of it
        more = ["records.jsonl"] if form == "hscr" else []
        assert archive.namelist() == ["preferences.jsonl", *more, *(f"images/{n}.png" for n in numbers)]
        assert all(archive.read(f"images/{n}.png") == png(n) for n in numbers)


def test_the_routes_formats_are_the_exports() -> None:
    assert get_args(Form) == FORMATS


def test_a_zip_is_never_whole_in_memory() -> None:
    """64 MB of bytes that do not compress, in blocks: what is held stays under 4 MB."""
    import random

    noise = random.Random(0).randbytes(2**20)
    sizes = []

    def entries() -> Iterator[tuple[str, Iterator[bytes]]]:
        for n in range(4):
            yield f"{n}.bin", (noise for _ in range(16))

    tracemalloc.start()
    for block in zipped(entries()):
        sizes.append(len(block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) > 64 * 2**20
    assert peak < 4 * 2**20


def test_a_missing_image_ends_the_zip_unfinished(job: str, settings: Settings, tmp_path: Path) -> None:
    """The response has begun by then: the receiver must not take what came for a whole archive."""
    file = preferences.opened(settings.data_dir, job)
    sent = bytearray()
    blocks = preferences.as_zip(file, "trl", tmp_path)
    with pytest.raises(FileNotFoundError):
        sent.extend(byte for block in blocks for byte in block)
    assert file.closed
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(bytes(sent)))


def test_a_missing_data_set_is_said_before_anything_is_sent(
    client: TestClient, job: str, settings: Settings, dataset: Any
) -> None:
    (settings.data_dir / "datasets" / dataset.digest.replace(":", "-") / "records.jsonl").unlink()
    answer = client.get(f"/jobs/{job}/preferences/export?format=trl")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")
    alone = client.get(f"/jobs/{job}/preferences/export?format=trl&images=false")
    assert json.loads(alone.text.splitlines()[0])["images"] == ["images/0.png"]
