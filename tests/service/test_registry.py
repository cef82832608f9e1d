"""The registry's routes: versions, lineage, aliases with history, download, references."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hscr.artifacts import verify_manifest
from service import adapters
from service.db import Database
from service.errors import Problem
from service.settings import Settings
from tests.service.serving import put_version
from worker.supervise import run_job

pytestmark = pytest.mark.either_database


@pytest.fixture
def publish(
    database: Database, settings: Settings, new_job: Callable[..., str], stand_in: Callable[..., None]
) -> Callable[..., str]:
    """Run a job of the stand-in to its end; its id."""

    def make(steps: int = 5, metrics: dict[str, float] | None = None, **values: Any) -> str:
        stand_in(steps=steps, **({} if metrics is None else {"metrics": metrics}))
        job_id = new_job(**values)
        run_job(database, settings, job_id, lambda: False)
        return job_id

    return make


def test_lineage_leads_from_a_version_to_its_rows(
    client: TestClient, dataset: Any, publish: Callable[..., str]
) -> None:
    job_id = publish()
    version = client.get("/adapters/brain/versions/1").json()
    assert (version["job_id"], version["dataset_id"], version["dataset_digest"]) == (job_id, dataset.id, dataset.digest)
    assert version["metrics"] == {"accuracy": 0.5}
    job = client.get(f"/jobs/{job_id}").json()
    assert job["lineage"]["adapter"] == {"name": "brain", "version": 1, "digest": version["digest"]}
    detail = client.get("/adapters/brain").json()
    assert (detail["last_version"], detail["versions"], detail["aliases"]) == (1, [1], [])
    assert [a["name"] for a in client.get("/adapters").json()["data"]] == ["brain"]


def test_download_is_the_folder_with_its_manifest(
    client: TestClient, publish: Callable[..., str], tmp_path: Any
) -> None:
    publish()
    answer = client.get("/adapters/brain/versions/1/download")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "got")
    assert verify_manifest(tmp_path / "got" / "brain-1") == client.get("/adapters/brain/versions/1").json()["digest"]


def test_damaged_file_is_not_handed_out(client: TestClient, settings: Settings, publish: Callable[..., str]) -> None:
    publish()
    digest = client.get("/adapters/brain/versions/1").json()["digest"]
    (adapters.folder(settings.data_dir, digest) / "adapter_model.safetensors").write_bytes(b"other")
    answer = client.get("/adapters/brain/versions/1/download")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")
    assert str(settings.data_dir) not in answer.text


def test_alias_moves_and_rollback_are_kept(client: TestClient, publish: Callable[..., str]) -> None:
    publish(5)
    publish(6)
    for version, reason in ((1, "first"), (2, "better"), (2, "again"), (1, "rollback")):
        answer = client.put("/adapters/brain/aliases/champion", json={"version": version, "reason": reason})
        assert (answer.status_code, answer.json()["version"]) == (200, version)
    moves = client.get("/adapters/brain/aliases/champion/history").json()["data"]
    assert [(m["from_version"], m["to_version"], m["reason"], m["actor"]) for m in moves] == [
        (None, 1, "first", "local"),
        (1, 2, "better", "local"),
        (2, 1, "rollback", "local"),
    ]
    assert client.put("/adapters/brain/aliases/champion", json={"version": 3}).json()["code"] == "version_not_found"
    assert client.put("/adapters/none/aliases/champion", json={"version": 1}).json()["code"] == "adapter_not_found"
    assert client.put("/adapters/brain/aliases/a@b", json={"version": 1}).json()["code"] == "invalid_request"


def test_references_resolve_to_one_version(database: Database, client: TestClient, publish: Callable[..., str]) -> None:
    publish(5)
    publish(6)

    def resolved(reference: str) -> int | str:
        try:
            with database.read() as session:
                return adapters.resolve(session, reference).version
        except Problem as problem:
            return problem.code

    assert (resolved("brain"), resolved("brain:1"), resolved("brain:2")) == (2, 1, 2)
    client.put("/adapters/brain/aliases/champion", json={"version": 1})
    client.put("/adapters/brain/aliases/next", json={"version": 2})
    assert (resolved("brain"), resolved("brain@champion"), resolved("brain@next")) == (1, 1, 2)
    assert (resolved("brain@none"), resolved("brain:9"), resolved("none")) == (
        "alias_not_found",
        "version_not_found",
        "adapter_not_found",
    )
    assert {resolved(r) for r in ("../x", "brain:", "brain@", "brain:1x", "Brain", "a" * 70, "brain@x:1")} == {
        "adapter_not_found"
    }


def test_report_is_served_without_scripts(client: TestClient, publish: Callable[..., str]) -> None:
    job_id = publish()
    page = client.get(f"/jobs/{job_id}/report")
    assert (page.text, page.headers["content-type"]) == ("<h1>report</h1>", "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].endswith("sandbox")
    assert client.get(f"/jobs/{job_id}/report", headers={"Accept": "application/json"}).json() == {"steps": 5}


def test_rollback_goes_one_move_further_back_each_time(client: TestClient, publish: Callable[..., str]) -> None:
    for steps in (5, 6, 7):
        publish(steps)
    path = "/adapters/brain/aliases/champion"
    assert client.post(f"{path}/rollback").json()["code"] == "alias_not_found"
    for version in (1, 2, 3):
        client.put(path, json={"version": version})
    assert client.post(f"{path}/rollback", json={"reason": "worse"}).json()["version"] == 2
    assert client.post(f"{path}/rollback").json()["version"] == 1
    answer = client.post(f"{path}/rollback")
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_roll_back")
    client.put(path, json={"version": 3})
    assert client.post(f"{path}/rollback").json()["version"] == 1, (
        "back to where it stood, not to what was undone before"
    )
    moves = client.get(f"{path}/history").json()["data"]
    assert [(m["from_version"], m["to_version"], m["rollback"]) for m in moves] == [
        (None, 1, False), (1, 2, False), (2, 3, False), (3, 2, True), (2, 1, True), (1, 3, False), (3, 1, True),
    ]  # fmt: skip
    assert moves[3]["reason"] == "worse"
    actions = [e["action"] for e in client.get("/audit", params={"subject": "brain@champion"}).json()["data"]]
    assert actions == ["alias.rollback" if m["rollback"] else "alias.move" for m in moves]


def test_rollbacks_at_once_undo_one_move_each(client: TestClient, publish: Callable[..., str]) -> None:
    for steps in (5, 6, 7, 8):
        publish(steps)
    path = "/adapters/brain/aliases/champion"
    for version in (1, 2, 3, 4):
        client.put(path, json={"version": version})
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(lambda _: client.post(f"{path}/rollback").json()["version"], range(3)))
    assert sorted(seen) == [1, 2, 3]


def test_move_is_noted_with_the_key_that_made_it(client: TestClient, database: Database, publish: Any) -> None:
    from service import keys

    publish()
    with database.write() as session:
        key, secret = keys.create(session, "test", name="k", scopes=["align"])
    headers = {"Authorization": f"Bearer {secret}"}
    client.put("/adapters/brain/aliases/champion", json={"version": 1, "reason": "why"}, headers=headers)
    (move,) = client.get("/adapters/brain/aliases/champion/history", headers=headers).json()["data"]
    assert (move["actor"], move["reason"]) == (key.id, "why")


def test_tags_and_notes_are_all_that_changes_of_a_version(client: TestClient, publish: Callable[..., str]) -> None:
    for steps in (5, 6, 7):
        publish(steps)
    path = "/adapters/brain/versions/2"
    before = client.get(path).json()
    assert (before["tags"], before["notes"]) == ([], None)
    after = client.patch(path, json={"tags": ["approved", "ct", "ct"], "notes": "Read by N."}).json()
    assert after == before | {"tags": ["approved", "ct"], "notes": "Read by N."}
    assert client.patch(path, json={"tags": ["ct"]}).json()["notes"] == "Read by N."
    assert client.patch(path, json={"notes": ""}).json() == before | {"tags": ["ct"], "notes": None}
    client.patch("/adapters/brain/versions/3", json={"tags": ["ct", "new"]})
    listed = lambda **q: [v["version"] for v in client.get("/adapters/brain/versions", params=q).json()["data"]]  # noqa: E731
    assert listed() == [3, 2, 1]
    assert (listed(tag="ct"), listed(tag="new"), listed(tag="none")) == ([3, 2], [3], [])
    assert (listed(limit=2), listed(after=2)) == ([3, 2], [1])
    for wrong in (
        {"tags": ["a b"]},
        {"tags": ["../x"]},
        {"digest": "x"},
        {"tags": ["t"] * 51},
        {"notes": "x" * 10_001},
    ):
        assert client.patch(path, json=wrong).status_code == 422
    assert client.patch("/adapters/brain/versions/9", json={}).json()["code"] == "version_not_found"
    told = [e["data"]["fields"] for e in client.get("/audit", params={"subject": "brain:2"}).json()["data"][1:]]
    assert told == [["notes", "tags"], ["tags"], ["notes"]], "what changed nothing is not noted"


def test_versions_of_one_digest_come_in_pages(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    """Equal weights under four names, one of them twice; names sort as the database sorts them."""
    folder = tmp_path / "same"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    database = client.app.state.hscr.database  # type: ignore[attr-defined]
    wanted = [("a", 1), ("a.b", 1), ("a.b", 2), ("a_b", 1), ("ab", 1)]
    digests = {
        put_version(database, settings.data_dir, folder, name, n, "m") for name, n in reversed(wanted[:2] + wanted[3:])
    }
    digests.add(put_version(database, settings.data_dir, folder, "a.b", 2, "m"))
    (digest,) = digests
    seen: list[tuple[str, int]] = []
    after: dict[str, str] = {}
    for more in (True, True, False):
        page = client.get("/lineage", params={"digest": digest, "limit": 2, **after}).json()
        seen += [(v["version"]["name"], v["version"]["version"]) for v in page["data"]]
        assert page["has_more"] is more
        after = {"after": page["next"]}
    assert sorted(seen) == wanted
    assert page["next"] is None
    assert client.get("/lineage", params={"digest": digest, "after": "ab:1"}).json()["data"] == []
    for odd in ("ab", "ab:", "ab:x", "ab:1111111111", "../x:1", "a%00:1"):
        assert client.get(f"/lineage?digest={digest}&after={odd}").status_code == 422


def test_lineage_leads_both_ways(client: TestClient, dataset: Any, publish: Callable[..., str]) -> None:
    first, second = publish(5, evaluation_dataset_id=dataset.id), publish(6, adapter_name="chest")
    client.put("/adapters/chest/aliases/champion", json={"version": 1})
    digest = client.get("/adapters/brain/versions/1").json()["digest"]
    (origin,) = client.get("/lineage", params={"digest": digest}).json()["data"]
    assert origin == client.get("/adapters/brain/versions/1/lineage").json()
    assert (origin["version"]["name"], origin["job"]["id"], origin["aliases"]) == ("brain", first, [])
    assert origin["dataset"]["digest"] == origin["evaluation_dataset"]["digest"] == dataset.digest
    assert origin["preferences_digest"].startswith("sha256:")
    assert len(client.get(origin["dataset"]["records_url"]).json()["data"]) == 3
    uses = client.get(f"/datasets/{dataset.id}/lineage").json()["data"]
    assert [(u["job_id"], u["use"], u["version"]["name"], u["aliases"]) for u in uses] == [
        (first, ["alignment", "evaluation"], "brain", []),
        (second, ["alignment"], "chest", ["champion"]),
    ]
    page = client.get(f"/datasets/{dataset.id}/lineage", params={"limit": 1}).json()
    rest = client.get(f"/datasets/{dataset.id}/lineage", params={"after": page["next"]}).json()["data"]
    assert page["data"] + rest == uses
    client.delete(f"/jobs/{first}")
    kept = client.get("/adapters/brain/versions/1/lineage").json()
    assert kept["job"].pop("deleted_at") is not None
    assert kept["job"] == {k: v for k, v in origin["job"].items() if k != "deleted_at"}
    assert client.get("/lineage", params={"digest": "sha256:" + "0" * 64}).json()["code"] == "version_not_found"
    assert client.get("/datasets/ds_none/lineage").json()["code"] == "dataset_not_found"
