"""The same life cycle with the real `hscr align` and the real engine, on a tiny random LLaVA: upload, align, publish, ask."""

from __future__ import annotations

import base64
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hscr.data_set import DataSet, checked_preferences
from hscr.records import read_preferences
from service.app import create_app
from service.db import Database, upgrade
from service.settings import Settings
from tests.conftest import wait_for
from tests.hscr.tiny import save_records, save_tiny_llava
from worker.supervise import run_job


def zipped(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(folder).as_posix())
    return out.getvalue()


@pytest.mark.thorough
def test_align_through_the_service_and_ask_base_and_adapter(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    model, data = save_tiny_llava(tmp_path / "tiny"), save_records(tmp_path / "records")
    settings = Settings(data_dir=tmp_path / "data", model=str(model), device="cpu", lease_s=30)
    upgrade(settings.database)
    database = Database(settings.database)
    image = next(p for p in sorted(data.rglob("*")) if p.suffix == ".png").read_bytes()
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        dataset = client.post("/datasets", files={"file": ("x.zip", zipped(data))}).json()
        answer = client.post(
            "/align",
            json={
                "dataset": dataset["id"],
                "adapter": "tiny",
                "preference": {"similarity": "token_f1"},
                "optimization": {"lr": 0.01, "epochs": 4, "batch_size": 4},
                "evaluation": {"dataset": dataset["id"], "n_bootstrap": 100, "max_new_tokens": 8, "allow_leak": True},
            },
        )
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["id"]
        run_job(database, settings, job_id, lambda: False)
        job = client.get(f"/jobs/{job_id}").json()
        assert job["status"] == "succeeded", (
            job["error"],
            (settings.data_dir / "runs" / job_id / "run.log").read_text()[-2000:],
        )
        events = client.get(f"/jobs/{job_id}/events", params={"limit": 500}).json()["data"]
        stages = [e["data"]["stage"] for e in events if e["type"] == "stage" and e["data"]["status"] == "started"]
        assert stages == ["generating", "optimizing", "evaluating", "reporting", "publishing"]
        assert client.get(f"/jobs/{job_id}/report").status_code == 200
        levels = client.get(f"/jobs/{job_id}/preferences").json()["data"]
        assert [p["record"]["id"] for p in levels] == [f"r{n}" for n in range(8)]
        assert any(p["levels"] for p in levels)
        assert all(p["words"] for p in levels)
        again_folder = tmp_path / "again"
        export = client.get(f"/jobs/{job_id}/preferences/export", params={"format": "hscr"}).content
        zipfile.ZipFile(io.BytesIO(export)).extractall(again_folder)
        assert len(DataSet(again_folder).records) == 8
        assert DataSet(again_folder).given == again_folder / "preferences.jsonl"
        back = client.post("/datasets", files={"file": ("again.zip", export)}, data={"name": "again"}).json()
        stored = DataSet(settings.data_dir / "datasets" / back["digest"].replace(":", "-"))
        made = read_preferences(again_folder / "preferences.jsonl")
        assert list(checked_preferences(stored.folder / "preferences.jsonl", stored.records)) == list(made)

        other = client.post(
            "/datasets", files={"file": ("y.zip", zipped(save_records(tmp_path / "more", 4, first=20)))}
        ).json()
        asked = {"dataset": other["id"], "adapter": "tiny", "evaluation": {"n_bootstrap": 100, "max_new_tokens": 4}}
        evaluation = client.post("/evaluate", json=asked).json()["id"]
        run_job(database, settings, evaluation, lambda: False)
        measured = client.get(f"/jobs/{evaluation}").json()
        log = settings.data_dir / "runs" / evaluation / "run.log"
        assert measured["status"] == "succeeded", (measured["error"], log.read_text()[-2000:])
        (kept,) = client.get("/adapters/tiny/versions/1/evaluations").json()["data"]
        assert kept["metrics"]["gain/open/strict/n"] == 3
        assert "HSCR evaluation" in client.get(f"/jobs/{evaluation}/report").text

        wait_for(lambda: client.get("/readyz").status_code == 200, 60, "the model is loaded")
        ask = {
            "image": {"base64": base64.b64encode(image).decode()},
            "question": "Where is the lesion?",
            "max_tokens": 12,
        }
        base = client.post("/vqa", json=ask | {"grounding": "tokens"}).json()
        aligned = client.post("/vqa", json=ask | {"adapter": "tiny", "grounding": "summary"}).json()
        again = client.post("/vqa", json=ask).json()
        assert base["adapter"] is None
        assert base["model"]["id"] == "tiny"
        assert len(base["grounding"]["tokens"]) == base["usage"]["completion_tokens"]
        assert aligned["adapter"]["digest"] == job["lineage"]["adapter"]["digest"]
        assert aligned["token_ids"] != base["token_ids"]
        assert again["token_ids"] == base["token_ids"]
    database.close()
